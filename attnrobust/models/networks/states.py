"""The hidden states of a model at every piece, from its own forward pass."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.attention import Attention
from attnrobust.models.capture import Probe, Tap, run_model
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.models.listing import adapter_for
from attnrobust.models.networks.parts import refuse_at
from attnrobust.models.networks.plan import Plan


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a forward pass.

    Args:
        path: Where the module is in the model, by this name.
        module: The module.
        index: Which of its calls.
        count: How many there are.
    """

    path: str
    module: nn.Module
    index: int
    count: int

    def of(self, seen: Sequence[Any]) -> Any:
        """What was seen at this call.

        Raises:
            UnsupportedModelError: The module was called more or less often.
        """
        if len(seen) != self.count:
            modelled = "only one call is modelled" if self.count == 1 else f"{self.count} calls are modelled"
            raise refuse_at(self.path, f"is called {len(seen)} times in one forward pass; {modelled}")
        return seen[self.index]


def calls_of(model: nn.Module, paths: Sequence[str]) -> tuple[Call, ...]:
    """The calls that these paths are, one after the other; several paths may lead to one module."""
    modules = [model.get_submodule(path) for path in paths]
    found = (modules[:k].count(module) for k, module in enumerate(modules))
    return tuple(
        Call(path, module, index, modules.count(module))
        for path, module, index in zip(paths, modules, found, strict=True)
    )


@dataclass(frozen=True, eq=False)
class States:
    """What one forward pass showed.

    Args:
        entering: The tokens that enter each piece.
        leaving: The tokens that leave each piece.
        output: The model's output, cut to what the head gives.
        attention: Hooks on each block's attention, and which of its calls is the block's; ``call`` compares it with
            its specification.
    """

    entering: tuple[Float[Tensor, "n _"], ...]
    leaving: tuple[Float[Tensor, "n _"], ...]
    output: Float[Tensor, "r e"]
    attention: tuple[tuple[Probe, Call], ...]


def watch(model: nn.Module, plan: Plan, model_inputs: Mapping[str, Any]) -> States:
    """Run a model with hooks on every piece and every attention, and once without any, which gives the output.

    Some modules compute in another way where there are hooks (the fast path of torch's encoder layers), so the output
    is that of the model as it is.

    A module that is several pieces (weights shared between blocks) is called once for each, in their order.

    Raises:
        InputError: The model refuses the input.
        UnsupportedModelError: A module is not called once for every piece that it is, or on more than one input.
    """
    plain = _run(model, plan, model_inputs)
    calls = calls_of(model, [piece.path for piece in plan.pieces])
    attention = calls_of(model, [block.attention_path for block in plan.blocks])
    watched = {call.module: _Watched(model, call.path) for call in calls}
    probes = {c.module: Probe(_tap(model, c.module, b.attention)) for c, b in zip(attention, plan.blocks, strict=True)}
    last = _Watched(model, plan.head.module)
    try:
        _run(model, plan, model_inputs)
    finally:
        for probe in probes.values():
            probe.remove()
        for hooks in (*watched.values(), last):
            hooks.remove()
    output = _named(plain if not last.path else last.left(last.only), plan.head.attribute)
    return States(
        entering=tuple(matrix(watched[c.module].entered(c), c.path, batch_first=plan.batch_first) for c in calls),
        leaving=tuple(matrix(watched[c.module].left(c), c.path, batch_first=plan.batch_first) for c in calls),
        output=plan.head.of(matrix(output, last.path, batch_first=plan.batch_first)),
        attention=tuple((probes[c.module], c) for c in attention),
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
        UnsupportedModelError: The piece's module is not called once for every piece that it is, or the one that gives
            the output not exactly once.
    """
    call = calls_of(model, [piece.path for piece in plan.pieces])[index]
    entry = _Replaced(call, tokens, batch_first=plan.batch_first)
    last = _Watched(model, plan.head.module)
    try:
        plain = _run(model, plan, model_inputs)
    finally:
        entry.remove()
        last.remove()
    call.of(entry.calls)
    output = _named(plain if not last.path else last.left(last.only), plan.head.attribute)
    return plan.head.of(matrix(output, last.path, batch_first=plan.batch_first))


def _run(model: nn.Module, plan: Plan, model_inputs: Mapping[str, Any]) -> Any:
    """One forward call; a mode is active for those models alone that round inside: it would hide torch's fast paths."""
    with TrueFloat64() if plan.rounds_inside else nullcontext():
        return run_model(model, model_inputs)


class _Replaced:
    """A hook that lets other tokens enter a module at one of its calls."""

    def __init__(self, call: Call, tokens: Float[Tensor, "m d"], *, batch_first: bool) -> None:
        self.call, self.tokens, self.batch_first, self.calls = call, tokens, batch_first, list[bool]()
        self._hook = call.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls.append(len(self.calls) == self.call.index)
        if not self.calls[-1]:
            return args, kwargs
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


def _tap(model: nn.Module, module: nn.Module, attention: Attention) -> Tap:
    adapter = adapter_for(module, model)
    assert adapter is not None  # noqa: S101 - the block was read by it
    return Tap(module, adapter, attention)


class _Watched:
    """Hooks that keep what enters and leaves one module."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        module = model.get_submodule(path)
        self.only = Call(path, module, 0, 1)
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

    def entered(self, call: Call) -> Any:
        """What entered at a call."""
        return call.of(self.inputs)

    def left(self, call: Call) -> Any:
        """What left at a call."""
        return call.of(self.outputs)

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
