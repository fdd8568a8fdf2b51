"""The hidden states of a model at every piece, from its own forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.models.capture import Probe, Tap, run_model
from attnrobust.models.listing import adapter_for
from attnrobust.models.networks.parts import refuse_at
from attnrobust.models.networks.pieces import Block
from attnrobust.models.networks.plan import Plan


@dataclass(frozen=True, eq=False)
class States:
    """What one forward pass showed.

    Args:
        entering: The tokens that enter each piece.
        leaving: The tokens that leave each piece.
        output: The model's output, cut to what the head gives.
        attention: Hooks on each block's attention; ``checked`` compares it with its specification.
    """

    entering: tuple[Float[Tensor, "n _"], ...]
    leaving: tuple[Float[Tensor, "n _"], ...]
    output: Float[Tensor, "r e"]
    attention: tuple[Probe, ...]


def watch(model: nn.Module, plan: Plan, model_inputs: Mapping[str, Any]) -> States:
    """Run a model with hooks on every piece and every attention, and once without any, which gives the output.

    Some modules compute in another way where there are hooks (the fast path of torch's encoder layers), so the output
    is that of the model as it is.

    Raises:
        InputError: The model refuses the input.
        UnsupportedModelError: A piece is not called exactly once, or on more than one input.
    """
    plain = run_model(model, model_inputs)
    probes = [Probe(_tap(model, block)) for block in plan.blocks]
    watched = [_Watched(model, piece.path) for piece in plan.pieces]
    last = _Watched(model, plan.head.module)
    try:
        run_model(model, model_inputs)
    finally:
        for probe in probes:
            probe.remove()
        for hooks in (*watched, last):
            hooks.remove()
    output = _named(plain if not last.path else last.only(last.outputs), plan.head.attribute)
    return States(
        entering=tuple(matrix(w.only(w.inputs), w.path, batch_first=plan.batch_first) for w in watched),
        leaving=tuple(matrix(w.only(w.outputs), w.path, batch_first=plan.batch_first) for w in watched),
        output=plan.head.of(matrix(output, last.path, batch_first=plan.batch_first)),
        attention=tuple(probes),
    )


def output_behind(
    model: nn.Module, plan: Plan, model_inputs: Mapping[str, Any], index: int, tokens: Float[Tensor, "m d"]
) -> Float[Tensor, "r e"]:
    """The model's output with other tokens entering one piece; everything behind it is the model's own.

    Args:
        model: The model.
        plan: How it is read.
        model_inputs: Arguments of the forward call.
        index: The piece that these tokens enter.
        tokens: Any number of them, if the model takes it.

    Raises:
        InputError: The model refuses them.
        UnsupportedModelError: The piece, or the module that gives the output, is not called exactly once.
    """
    entry = _Replaced(model, plan.pieces[index].path, tokens, batch_first=plan.batch_first)
    last = _Watched(model, plan.head.module)
    try:
        plain = run_model(model, model_inputs)
    finally:
        entry.remove()
        last.remove()
    if entry.calls != 1:
        raise refuse_at(entry.path, f"is called {entry.calls} times in one forward pass; only one call is modelled")
    output = _named(plain if not last.path else last.only(last.outputs), plan.head.attribute)
    return plan.head.of(matrix(output, last.path, batch_first=plan.batch_first))


class _Replaced:
    """A hook that lets other tokens enter a module."""

    def __init__(self, model: nn.Module, path: str, tokens: Float[Tensor, "m d"], *, batch_first: bool) -> None:
        self.path, self.tokens, self.batch_first, self.calls = path, tokens, batch_first, 0
        self._hook = model.get_submodule(path).register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls += 1
        if args:
            return (self._like(args[0]), *args[1:]), kwargs
        name = next(name for name in _ENTERING if kwargs.get(name) is not None)
        return args, kwargs | {name: self._like(kwargs[name])}

    def _like(self, given: Tensor) -> Tensor:
        """The tokens in the shape and precision of what would have entered."""
        tokens = self.tokens.to(given)
        if given.ndim == 2:
            return tokens
        return tokens[None] if self.batch_first else tokens[:, None]

    def remove(self) -> None:
        self._hook.remove()


_ENTERING = ("hidden_states", "src", "input")
"""Names under which tokens enter a piece that is called with keyword arguments."""


def _tap(model: nn.Module, block: Block) -> Tap:
    module = model.get_submodule(block.attention_path)
    adapter = adapter_for(module, model)
    assert adapter is not None  # noqa: S101 - the block was read by it
    return Tap(module, adapter, block.attention)


class _Watched:
    """Hooks that keep what enters and leaves one module."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        module = model.get_submodule(path)
        self._hooks = (
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        )

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (kwargs.get(name) for name in _ENTERING)
        given = args[0] if args else next((value for value in named if value is not None), None)
        self.inputs.append(_kept(given))

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.outputs.append(_kept(output))

    def only(self, seen: list[Any]) -> Any:
        """The value of the only call."""
        if len(seen) != 1:
            raise refuse_at(self.path, f"is called {len(seen)} times in one forward pass; only one call is modelled")
        return seen[0]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _named(output: Any, name: str) -> Any:
    """The output of that name; a tuple has it first."""
    if isinstance(output, tuple) and not hasattr(output, name or " "):
        return output[0]
    return getattr(output, name, None) if name else output


def matrix(value: Any, path: str, *, batch_first: bool) -> Float[Tensor, "n d"]:
    """The rows (n, d) of one input, from a tensor with or without a batch dimension of size 1.

    Raises:
        UnsupportedModelError: Something else.
    """
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor) or value.is_nested or value.ndim not in (2, 3):
        shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) and not value.is_nested else type(value)
        raise refuse_at(path, f"has an input or output {shape}, not the tokens (1, n, d) of one input")
    if value.ndim == 2:
        return value.to(torch.float64)
    rows = value if batch_first else value.transpose(0, 1)
    if rows.shape[0] != 1:
        raise refuse_at(path, f"is called on {rows.shape[0]} inputs; give one input")
    return rows[0].to(torch.float64)
