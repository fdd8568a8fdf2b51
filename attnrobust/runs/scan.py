"""A model at a glance: which layers, heads and tokens are the most vulnerable, or how its decision is by depth."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.models.listing import LayerInfo
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.runs.depths import DepthRadii, depth_profile
from attnrobust.runs.heat import token_shares
from attnrobust.runs.rows import Row, median
from attnrobust.runs.work import Workbench


@dataclass(frozen=True)
class LayerRank:
    """One layer over all inputs.

    Args:
        layer: Its name.
        rows: Number of rows.
        relative_attack: Median of attack radius / norm of the layer's input; None if no attack succeeded.
        relative_certified: Median of certified radius / norm of the layer's input.
        attack_radius: Median attack radius.
        certified_radius: Median certified radius.
        gap: Median gap.
    """

    layer: str
    rows: int
    relative_attack: float | None
    relative_certified: float | None
    attack_radius: float | None
    certified_radius: float | None
    gap: float | None


@dataclass(frozen=True)
class HeadRank:
    """One head over all inputs.

    Args:
        layer: The layer's name.
        head: The head's index.
        sensitivity: Median of the largest singular value of the head's own Jacobian at the clean input (from below).
        relative: Median of that times norm of the input / norm of the layer's output: a move of 1 % of the input
            changes the output through this head alone by up to ``relative`` percent, to first order. It ranks, it
            bounds nothing. Both are None where they are not finite (an output of norm 0, an overflow).
    """

    layer: str
    head: int
    sensitivity: float | None
    relative: float | None


@dataclass(frozen=True)
class TokenRank:
    """One token string over all rows.

    Args:
        token: The string.
        rows: In how many rows it occurs.
        share: Mean share of the attacks' squared moves, over its occurrences.
    """

    token: str
    rows: int
    share: float


@dataclass(frozen=True)
class Scan:
    """The rankings, most vulnerable first; of a whole model the depths instead of layers and heads.

    Args:
        layers: By relative attack radius.
        heads: By relative sensitivity.
        tokens: By share of the attacks' moves.
        unsupported: Layers that were left out; ``reason`` says why.
        depths: From the input on.
    """

    layers: tuple[LayerRank, ...]
    heads: tuple[HeadRank, ...]
    tokens: tuple[TokenRank, ...]
    unsupported: tuple[LayerInfo, ...]
    depths: tuple[DepthRadii, ...] = ()


def outermost(layers: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
    """The supported layers that are not part of another supported one (a block counts once, with its projection)."""
    supported = [layer for layer in layers if layer.supported]
    names = [layer.name for layer in supported]
    return tuple(one for one in supported if not any(one.name.startswith(f"{name}.") for name in names if name))


def rank(rows: Sequence[Row], bench: Workbench, *, heads: bool = True) -> Scan:
    """Rank what a run found.

    Args:
        rows: The run's rows.
        bench: The run's workbench; it has the model and the inputs.
        heads: Whether to compute the heads' sensitivities (one Lanczos run per head and input).
    """
    if bench.networks is not None:
        return Scan(layers=(), heads=(), tokens=rank_tokens(rows), unsupported=(), depths=depth_profile(rows))
    return Scan(
        layers=rank_layers(rows),
        heads=rank_heads(bench) if heads else (),
        tokens=rank_tokens(rows),
        unsupported=tuple(layer for layer in bench.model.layers() if not layer.supported),
    )


def rank_layers(rows: Sequence[Row]) -> tuple[LayerRank, ...]:
    """Layers by median attack radius relative to their input, smallest first; without attacks by certified radius."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.layer, []).append(row)
    ranks = [
        LayerRank(
            layer=layer,
            rows=len(group),
            relative_attack=median(row.relative_attack for row in group),
            relative_certified=median(row.relative_certified for row in group),
            attack_radius=median(row.attack_radius for row in group),
            certified_radius=median(row.certified_radius for row in group),
            gap=median(row.gap for row in group),
        )
        for layer, group in groups.items()
    ]
    return tuple(sorted(ranks, key=lambda r: (_last(r.relative_attack), _last(r.relative_certified))))


def rank_heads(bench: Workbench) -> tuple[HeadRank, ...]:
    """Heads of the run's layers by relative sensitivity, largest first; softmax attention only."""
    ranks = []
    for layer in bench.layers:
        spec = bench.spec(layer.name)
        if not isinstance(spec, Attention):
            continue
        values = torch.tensor([head_sensitivities(spec, x) for x in bench.clean_tokens(layer.name)])
        sensitivity, relative = values.quantile(0.5, dim=0).unbind(-1)
        ranks += [
            HeadRank(layer.name, h, finite_or_none(sensitivity[h]), finite_or_none(relative[h]))
            for h in range(spec.heads)
        ]
    return tuple(sorted(ranks, key=lambda r: -_last(r.relative)))


def head_sensitivities(spec: Attention, x: torch.Tensor) -> list[tuple[float, float]]:
    """For each head: largest singular value of its Jacobian at x, and the same relative to input and output norms."""
    scale = float(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(spec(x)))
    found = []
    for head in range(spec.heads):
        jacobian = AttentionJacobian(single_head(spec, head), x)
        value = largest_singular_value_lower(jacobian.linear_map(), tol=1e-3)[0].value
        found.append((value, value * scale))
    return found


def single_head(spec: Attention, head: int) -> Attention:
    """The layer with one head alone; the sum over the heads, minus the repeated output biases, is the layer."""
    one = slice(head, head + 1)
    names = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "w_o")
    parts: dict[str, Any] = {name: None if getattr(spec, name) is None else getattr(spec, name)[one] for name in names}
    return replace(spec, **parts, b_o=None)


def rank_tokens(rows: Iterable[Row]) -> tuple[TokenRank, ...]:
    """Token strings by mean share of the attacks' squared moves, largest first."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        found = token_shares(row)
        if len(found) == len(row.tokens):
            for token, share in zip(row.tokens, found, strict=True):
                shares.setdefault(token, []).append(share)
    ranks = [TokenRank(token, len(values), statistics.fmean(values)) for token, values in shares.items()]
    return tuple(sorted(ranks, key=lambda r: (-r.share, r.token)))


def finite_or_none(value: torch.Tensor) -> float | None:
    """The number, or None where it is not finite."""
    return float(value) if bool(torch.isfinite(value)) else None


def _last(value: float | None) -> float:
    return float("inf") if value is None else value
