"""Inputs of a layer: texts captured from the model's own forward pass, or tokens from a file."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.models.adapters import Adapter, refuse
from attnrobust.models.arrays import read_arrays
from attnrobust.models.checks.agreement import disagreement
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.text import natural_order
from attnrobust.tokens import TokenMeasure


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
        call: Which of the module's calls in a forward pass, from 0; None for a module that is called once.
    """

    module: nn.Module
    adapter: Adapter
    spec: Attention
    call: int | None = None


def capture_tokens(
    model: nn.Module, module: nn.Module, adapter: Adapter, spec: Attention, model_inputs: Mapping[str, Any]
) -> Float[Tensor, "n d"]:
    """The tokens that enter one attention module; see ``capture_taps``."""
    return capture_taps(model, [Tap(module, adapter, spec)], model_inputs)[0]


def capture_taps(
    model: nn.Module, taps: Sequence[Tap], model_inputs: Mapping[str, Any]
) -> tuple[Float[Tensor, "n d"], ...]:
    """The tokens that enter attention modules in one forward pass of their model on one input.

    Each specification is applied to them and compared with what the module itself puts out in that pass; so a mask, a
    cache or a bias that only the model knows of cannot go unnoticed. What the model would round to float32 inside stays
    in float64.

    Args:
        model: The model, in float64 and eval mode.
        taps: The modules, one forward pass serves all.
        model_inputs: Keyword arguments of one forward call, batch size 1.

    Raises:
        UnsupportedModelError: A module is not called exactly once, is called on a batch, or puts out something else.
        InputError: The model refuses the input.
    """
    probes = [Probe(tap) for tap in taps]
    try:
        with TrueFloat64():
            run_model(model, model_inputs)
    finally:
        for probe in probes:
            probe.remove()
    return tuple(probe.checked() for probe in probes)


def run_model(model: nn.Module, model_inputs: Mapping[str, Any]) -> Any:
    """One forward call without gradients.

    Raises:
        UnsupportedModelError: Weights without values.
        InputError: The model refuses the input.
    """
    meta = [name for name, value in model.named_parameters() if value.is_meta]
    if meta:
        raise UnsupportedModelError(
            f"{meta[0]} is on the meta device, without values; load the model without offloading"
        )
    try:
        with torch.no_grad():
            return model(**model_inputs)
    except InputError:
        raise
    except Exception as error:  # a model may raise anything
        raise InputError(f"the model cannot be run on this input: {first_line(error)}{_hint(model, error)}") from error


def _hint(model: nn.Module, error: Exception) -> str:
    """The likely cause of a model's own error, where it is known."""
    config = getattr(model, "config", None)
    if isinstance(error, IndexError):
        sizes = {name: getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings")}
        limits = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
        return f"; a token id or position is outside of the model's table{f' ({limits})' if limits else ''}"
    if isinstance(error, TypeError):
        takes = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
        return f"; its forward takes {', '.join(takes[:8])}"
    return ""


class Probe:
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
        tokens = self.tap.adapter.input_tokens(self.tap.module, args, kwargs).detach()
        if tokens.is_nested:
            raise refuse(
                self.tap.module, "is called on nested tensors; build the model with enable_nested_tensor=False"
            )
        self.inputs.append(tokens.clone())

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.outputs.append(self.tap.adapter.output_tokens(self.tap.module, output).detach().clone())

    def checked(self) -> Float[Tensor, "n d"]:
        """What entered, if its module was called on one input and put out what its specification says.

        Raises:
            UnsupportedModelError: Otherwise.
        """
        return _checked(self.tap, *_one_call(self.tap, self.inputs, self.outputs))

    def call(self, index: int, count: int) -> Float[Tensor, "n d"]:
        """What entered at one of ``count`` calls, if it was on one input and put out what the specification says.

        Raises:
            UnsupportedModelError: Otherwise, or another number of calls.
        """
        if not len(self.inputs) == len(self.outputs) == count:
            raise UnsupportedModelError(
                f"{type(self.tap.module).__name__} is called {len(self.inputs)} times in one forward pass; "
                f"{count} calls are modelled"
            )
        return _checked(self.tap, self.inputs[index], self.outputs[index])

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _checked(tap: Tap, entering: Tensor, leaving: Tensor) -> Tensor:
    module, spec, name = tap.module, tap.spec, type(tap.module).__name__
    if entering.ndim != 3 or entering.shape[0] != 1:
        raise UnsupportedModelError(
            f"{name} is called on tokens of shape {tuple(entering.shape)}, not on one input (1, n, d)"
        )
    tokens, actual = entering[0], leaving[0]
    found = disagreement(spec, tokens, actual)
    if found is not None:
        raise UnsupportedModelError(
            f"{name}: its output inside the model differs from the specification by {found:.3g} of its size; "
            f"{_cause(module, spec, tokens, actual)}"
        )
    return tokens


def _one_call(tap: Tap, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What entered and left in the call that the tap means."""
    times, name = len(inputs), type(tap.module).__name__
    if len(outputs) != times or times == 0 or (times > 1 and tap.call is None):
        which = (
            f" (for one of them add #0 .. #{times - 1} to the layer's name; a whole network may run it several times: "
            "--at block:K)"
            if times > 1
            else ""
        )
        raise UnsupportedModelError(
            f"{name} is called {times} times in one forward pass; only a single call has a single input{which}"
        )
    call = tap.call or 0
    if call >= times:
        raise InputError(f"{name} is called {times} times in one forward pass; there is no call #{call}")
    return inputs[call], outputs[call]


def _cause(module: nn.Module, spec: Attention, tokens: Tensor, actual: Tensor) -> str:
    if not spec.causal and disagreement(replace(spec, causal=True), tokens, actual) is None:
        cure = "; from_torch(module, causal=True) specifies it" if type(module) is nn.MultiheadAttention else ""
        return f"the model adds a causal mask that the module itself does not tell of{cure}"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        return f"attn_implementation={implementation!r} may round to float32; load the model with 'sdpa'"
    return "the model adds a mask (padding, say: delete the padded tokens), bias or cache that is not modelled"
