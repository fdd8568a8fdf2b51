"""Inputs of a layer: texts captured from the model's own forward pass, or tokens from a file."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.models.adapters import Adapter
from attnrobust.models.arrays import read_arrays
from attnrobust.text import natural_order
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
    for key in sorted(arrays, key=natural_order):
        try:
            measure = TokenMeasure(arrays[key])
        except InputError as error:
            raise InputError(f"{path}: input {key!r}: {error}") from error
        if width is not None and measure.width != width:
            raise InputError(f"{path}: input {key!r} has tokens of width {measure.width}, the layer takes {width}")
        inputs.append(CapturedInput(id=key, text=None, token_strings=(), measure=measure))
    return tuple(inputs)


@dataclass(frozen=True, eq=False)
class Tap:
    """A place in a model where tokens are captured.

    Args:
        module: The attention module inside the model.
        adapter: The module's adapter.
        spec: The module's specification.
    """

    module: nn.Module
    adapter: Adapter
    spec: Attention


def capture_tokens(
    model: nn.Module, module: nn.Module, adapter: Adapter, spec: Attention, model_inputs: Mapping[str, Tensor]
) -> Float[Tensor, "n d"]:
    """The tokens that enter one attention module; see ``capture_taps``."""
    return capture_taps(model, [Tap(module, adapter, spec)], model_inputs)[0]


def capture_taps(
    model: nn.Module, taps: Sequence[Tap], model_inputs: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "n d"], ...]:
    """The tokens that enter attention modules in one forward pass of their model on one input.

    Each specification is applied to them and compared with what the module itself puts out in that pass; so a mask, a
    cache or a bias that only the model knows of cannot go unnoticed.

    Args:
        model: The model, in float64 and eval mode.
        taps: The modules, one forward pass serves all.
        model_inputs: Keyword arguments of one forward call, batch size 1.

    Raises:
        UnsupportedModelError: A module is not called exactly once, is called on a batch, or puts out something else.
        InputError: The model refuses the input.
    """
    probes = [_Probe(tap) for tap in taps]
    try:
        with torch.no_grad():
            model(**model_inputs)
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the model cannot be run on this input: {first_line(error)}") from error
    finally:
        for probe in probes:
            probe.remove()
    return tuple(_checked(p.tap.module, p.tap.spec, p.inputs, p.outputs) for p in probes)


class _Probe:
    """Hooks that keep what enters and leaves one tap."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._hooks = (
            tap.module.register_forward_pre_hook(self._before, with_kwargs=True),
            tap.adapter.output_module(tap.module).register_forward_hook(self._after),
        )

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(self.tap.adapter.input_tokens(self.tap.module, args, kwargs).detach().clone())

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.outputs.append(self.tap.adapter.output_tokens(self.tap.module, output).detach().clone())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


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
