"""Attention layers whose tokens are the hidden states before the norm of their block: ``NAME@residual``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import UnknownNameError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.models.capture import Tap, capture_tokens
from attnrobust.models.normalisation import normalisation_from_torch

NORMED, RESIDUAL, SUM = "normed", "residual", "residual-sum"
PLACES = (NORMED, RESIDUAL, SUM)
"""Where an attention layer's tokens move: behind its block's norm (they enter the attention), or before it; and before
it with the block's sum of the two as the output."""

MARK = "@"
NORMS = (
    "input_layernorm", "layernorm_before", "layer_norm1", "ln_1", "ln1", "norm1", "norm_1", "attention_norm",
    "attn_norm", "self_attn_layer_norm", "ln_attn",
)  # fmt: skip
"""Names of the norm in front of attention inside a block; what it is found to do in a forward pass decides."""
LEVELS = 2
"""Modules around the attention in which the norm is looked for."""
AGREES = 1e-9
"""Largest relative difference of states that are the same: float64 rounding of one norm or sum is about 1e-15."""


def split_place(name: str | None) -> tuple[str | None, str]:
    """A layer's name and where its tokens move, as in ``layers.5.self_attn@residual``; "normed" without.

    Raises:
        UnknownNameError: Another place.
    """
    base, mark, place = (name or "").rpartition(MARK)
    if not mark:
        return name, NORMED
    if place not in PLACES:
        raise UnknownNameError("place of the tokens", place, PLACES)
    return base or None, place


def with_place(name: str, place: str) -> str:
    """The name of the layer with its tokens moving there."""
    return name if place == NORMED else f"{name}{MARK}{place}"


@dataclass(frozen=True, eq=False)
class NormTap:
    """An attention module with the norm in front of it.

    Args:
        tap: The attention.
        block: The module that holds both.
        norm: The norm's module.
        layer: Both as one specification.
    """

    tap: Tap
    block: nn.Module
    norm: nn.Module
    layer: PreNormAttention


def norm_tap(model: nn.Module, name: str, tap: Tap, place: str) -> NormTap:
    """The norm that the block of an attention has by its name; a forward pass checks it at every input.

    Raises:
        UnsupportedModelError: None, or one that is not modelled.
    """
    path = name
    for _ in range(LEVELS):
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        found = next((norm for norm in NORMS if isinstance(getattr(block, norm, None), nn.Module)), None)
        if found is not None:
            module = block.get_submodule(found)
            return NormTap(tap, block, module, _specified(module, f"{path}.{found}", tap.spec, place))
        if not path:
            break
    raise UnsupportedModelError(
        f"no norm is known in front of {name}: its block has none of {', '.join(NORMS[:4])}, ...; its tokens can move "
        "where they enter the attention (--at normed)"
    )


def _specified(module: nn.Module, path: str, attention: Attention, place: str) -> PreNormAttention:
    try:
        norm: LayerNorm | RMSNorm = normalisation_from_torch(module)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    return PreNormAttention(norm, attention, residual=place == SUM)


def capture_hidden(model: nn.Module, found: NormTap, model_inputs: Mapping[str, Any]) -> Float[Tensor, "n d"]:
    """The hidden states that enter the norm of one attention, in one forward pass of the model on one input.

    What leaves the norm must be what enters the attention; and where the tokens are added, a module of the block must
    take the sum.

    Raises:
        UnsupportedModelError: Otherwise, and what ``capture_tokens`` refuses.
    """
    states: list[Tensor] = []
    entering: list[Tensor] = []
    hooks = [found.norm.register_forward_pre_hook(lambda _, args: states.append(args[0].detach().clone()))]
    if found.layer.residual:
        hooks += [part.register_forward_pre_hook(_keeping(entering)) for part in found.block.modules()]
    try:
        tokens = capture_tokens(model, found.tap.module, found.tap.adapter, found.tap.spec, model_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = _matching(found, states, tokens)
    if found.layer.residual:
        added = found.layer(hidden)
        if not any(state.shape == (1, *added.shape) and _same(state[0], added) for state in entering):
            raise UnsupportedModelError(
                f"{type(found.block).__name__} does not pass on the sum of its hidden states and the attention's "
                "output; ask for --at residual, the attention's output alone"
            )
    return hidden


def _keeping(entering: list[Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        entering.extend(arg.detach().clone() for arg in args if isinstance(arg, Tensor) and arg.ndim == 3)

    return keep


def _matching(found: NormTap, states: list[Tensor], tokens: Tensor) -> Float[Tensor, "n d"]:
    """The call of the norm whose output is what entered the attention."""
    for state in states:
        if state.shape == (1, *tokens.shape) and _same(found.layer.norm(state[0].to(torch.float64)), tokens):
            return state[0]
    raise UnsupportedModelError(
        f"what enters {type(found.tap.module).__name__} is not what {type(found.norm).__name__} of its block puts out; "
        "its tokens can move where they enter the attention (--at normed)"
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= AGREES * expected.abs().max())
