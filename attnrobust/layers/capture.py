"""Inputs of a layer: texts captured from the model's own forward pass, or tokens from a file."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.layers.adapters import Adapter
from attnrobust.layers.attention import Attention
from attnrobust.layers.files import read_arrays
from attnrobust.tokens import TokenMeasure

AGREEMENT = 1e-9  # relative; the model's float64 forward and the specification agree to ~1e-14


@dataclass(frozen=True)
class TextLine:
    """One line of a text file.

    Args:
        id: Line number and a short digest of the text, such as ``0003-1f0e9c2b``.
        text: The line.
    """

    id: str
    text: str


@dataclass(frozen=True, eq=False)
class CapturedInput:
    """One input of a layer.

    Args:
        id: Unique in its file.
        text: The text it comes from; None for tokens from a file.
        token_strings: What each token stands for in the text; empty for tokens from a file.
        measure: The layer's input tokens in float64.
    """

    id: str
    text: str | None
    token_strings: tuple[str, ...]
    measure: TokenMeasure


def text_line(number: int, text: str) -> TextLine:
    """A text with its identifier; ``number`` counts from 1."""
    return TextLine(id=f"{number:04d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text=text)


def read_texts(path: str | Path) -> tuple[TextLine, ...]:
    """Read a UTF-8 file with one input a line; empty lines are skipped, but counted in the line numbers.

    Raises:
        InputError: No such file, not UTF-8, or no line with text.
    """
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the texts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, one input a line"
        ) from error
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    texts = tuple(text_line(number, line) for number, line in enumerate(lines, start=1) if line.strip())
    if not texts:
        raise InputError(f"{path} holds no text; write one input a line")
    return texts


def read_tokens(path: str | Path, *, width: int | None = None) -> tuple[CapturedInput, ...]:
    """Read a ``.npz`` or ``.safetensors`` file whose every array (n, d) is one input and whose keys are the ids.

    Args:
        path: The file.
        width: The token width d that the layer takes; None does not check it.

    Returns:
        The inputs in the natural order of their ids (``x2`` before ``x10``).

    Raises:
        InputError: No such file, no arrays, a wrong shape or width, entries that are NaN, infinite or integers.
    """
    arrays = read_arrays(path)
    if not arrays:
        raise InputError(f"{path} holds no arrays; every array (n, d) is one input")
    inputs = []
    for key in sorted(arrays, key=_natural_order):
        try:
            measure = TokenMeasure(arrays[key])
        except InputError as error:
            raise InputError(f"{path}: input {key!r}: {error}") from error
        if width is not None and measure.width != width:
            raise InputError(f"{path}: input {key!r} has tokens of width {measure.width}, the layer takes {width}")
        inputs.append(CapturedInput(id=key, text=None, token_strings=(), measure=measure))
    return tuple(inputs)


def capture_tokens(
    model: nn.Module, module: nn.Module, adapter: Adapter, spec: Attention, model_inputs: Mapping[str, Tensor]
) -> Float[Tensor, "n d"]:
    """The tokens that enter an attention module in one forward pass of its model on one input.

    The specification is applied to them and compared with what the module itself puts out in that pass; so a mask, a
    cache or a bias that only the model knows of cannot go unnoticed.

    Args:
        model: The model, in float64 and eval mode.
        module: The attention module inside it.
        adapter: The module's adapter.
        spec: The module's specification.
        model_inputs: Keyword arguments of one forward call, batch size 1.

    Raises:
        UnsupportedModelError: The module is not called exactly once, is called on a batch, or puts out something else.
        InputError: The model refuses the input.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(adapter.input_tokens(module, args, kwargs).detach().clone())

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(adapter.output_tokens(module, output).detach().clone())

    hooks = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        adapter.output_module(module).register_forward_hook(after),
    )
    try:
        with torch.no_grad():
            model(**model_inputs)
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the model cannot be run on this input: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return _checked(module, spec, inputs, outputs)


def _checked(module: nn.Module, spec: Attention, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
    name = type(module).__name__
    if len(inputs) != 1 or len(outputs) != 1:
        raise UnsupportedModelError(
            f"{name} is called {len(inputs)} times in one forward pass; only a single call has a single input"
        )
    if inputs[0].ndim != 3 or inputs[0].shape[0] != 1:
        raise UnsupportedModelError(
            f"{name} is called on tokens of shape {tuple(inputs[0].shape)}, not on one input (1, n, d)"
        )
    tokens, expected = inputs[0][0], outputs[0][0]
    difference = float((spec(tokens) - expected).abs().max())
    if not difference <= AGREEMENT * max(1.0, float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{name}: its output inside the model differs from the specification by {difference:.3g}; the model adds a "
            "mask, bias or cache that is not modelled, or rounds to float32 (load it with attn_implementation='sdpa')"
        )
    return tokens


def _natural_order(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]
