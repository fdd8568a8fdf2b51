"""Rows that see the moving token as one key: the best quadratic above each, with its constant (Theorem 2)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.one_token.logistic import logistic_change, remainder_range, steepest_turn
from attnrobust.certify.margin.one_token.rows import TokenFunctional
from attnrobust.numerics.rounding import CANCELLATION, ENTRY, SMALLEST_UNIT, outward

SEARCH_NODES, PROOF_NODES = 33, 121  # of the range of a, while parameters are chosen and for the bound
START_SHARE, START_SPREAD = 0.6, 0.1  # of the range of a, of the largest remainder: a first curve and spread
LARGEST = 4.0  # first curve and spread in their units


@dataclass(frozen=True, eq=False)
class ForeignParameters:
    """The quadratic ``c + (s'v + b) a + (e - s) t + C a^2/2 + m a t + k t^2/2`` of every foreign row (h, i, l).

    In units of the row's largest drop and of the ranges of a and t; any values are sound.

    Args:
        tilt: b.
        curve: C.
        lean: e.
        mixed: m.
        spread: k, positive.
    """

    tilt: Float[Tensor, "h n l"]
    curve: Float[Tensor, "h n l"]
    lean: Float[Tensor, "h n l"]
    mixed: Float[Tensor, "h n l"]
    spread: Float[Tensor, "h n l"]


@dataclass(frozen=True, eq=False)
class ForeignRows:
    """Foreign rows at one radius.

    Args:
        group: The functional at the candidate tokens.
        logit: x.
        value: v.
        reach: Largest ``|a|``.
        lift: Largest ``|t|``.
        size: Upper estimate of the drop; the unit of the parameters.
    """

    group: TokenFunctional
    logit: Float[Tensor, "h n l"]
    value: Float[Tensor, "h n l"]
    reach: Float[Tensor, "h n l"]
    lift: Float[Tensor, "h n l"]
    size: Float[Tensor, "h n l"]


def foreign_rows(group: TokenFunctional, radius: float) -> ForeignRows:
    """Ranges and units at a radius."""
    logit, value = group.token.logit, group.rest_advantage
    reach = outward(radius * group.token.pair_norm, ENTRY)
    reach = reach.expand_as(logit).clamp_min(SMALLEST_UNIT)
    lift = outward(radius * group.functional.value_norm, ENTRY)[:, None].expand_as(logit).clamp_min(SMALLEST_UNIT)
    x = logit.clamp(-1e6, 1e6)
    change = torch.maximum(logistic_change(x, reach), -logistic_change(x, -reach))
    size = change * value.abs() + torch.sigmoid(x + reach) * lift
    return ForeignRows(group, x, value, reach, lift, size.clamp_min(SMALLEST_UNIT))


def foreign_start(found: ForeignRows) -> ForeignParameters:
    """Exact to second order as the radius tends to 0, reasonable elsewhere."""
    upper, lower = remainder_range(found.logit, START_SHARE * found.reach)
    square, rate = found.reach**2 / found.size, torch.maximum(upper, -lower)
    curve = torch.maximum(found.value * upper, found.value * lower) + START_SPREAD * found.lift * rate
    slope = torch.sigmoid(found.logit) * torch.sigmoid(-found.logit)
    zero = torch.zeros_like(curve)
    return ForeignParameters(
        tilt=zero,
        curve=(curve * square).clamp(-LARGEST, LARGEST),
        lean=zero,
        mixed=-slope * found.reach * found.lift / found.size,
        spread=(START_SPREAD * rate * found.lift * square).clamp(1e-6, LARGEST),
    )


def foreign_constant(found: ForeignRows, par: ForeignParameters, *, nodes: int) -> Float[Tensor, "h n l"]:
    """Upper bound of c: the largest drop above the rest of the quadratic over ``|a| <= reach, |t| <= lift``.

    With ``S(a) = s(x + a) - s(x)`` it is the maximum of ``S v - s' v a - b a - C a^2/2 + H(-S - e - m a)``, where
    ``H(z) = max of z t - k t^2/2`` over t. Each of these functions has at least the curvature ``-K``, so between
    nodes at distance s it stays below their largest value plus ``K s^2 / 8``.
    """
    share = torch.linspace(-1.0, 1.0, nodes, dtype=found.reach.dtype, device=found.reach.device)
    reach, lift, size = found.reach[..., None], found.lift[..., None], found.size
    a, x, v = share * reach, found.logit[..., None], found.value[..., None]
    change = logistic_change(x, a)
    slope = torch.sigmoid(x) * torch.sigmoid(-x)
    unit = size[..., None]
    curve, spread = par.curve[..., None], par.spread[..., None]
    # Everything in units: t in lift, a in reach, values in size.
    pull = -(change * lift / unit) - par.lean[..., None] - par.mixed[..., None] * share
    t = (pull / spread.clamp_min(SMALLEST_UNIT)).detach().clamp(-1.0, 1.0)
    above = (change - slope * a) * v / unit - par.tilt[..., None] * share - 0.5 * curve * share**2
    above = above + pull * t - 0.5 * spread * t**2
    bend = steepest_turn(found.logit, found.reach) * (found.value.abs() + found.lift) * (found.reach**2 / size)
    pad = (par.curve + bend).clamp_min(0.0) * (2.0 / (nodes - 1)) ** 2 / 8.0
    terms = 2.0 + par.tilt.abs() + par.curve.abs() + par.lean.abs() + par.mixed.abs() + par.spread
    return (above.amax(-1) + pad + CANCELLATION * terms) * size


def foreign_form(
    found: ForeignRows, par: ForeignParameters, *, nodes: int
) -> tuple[Float[Tensor, "h l m m"], Float[Tensor, "h l m"], Float[Tensor, "l"]]:
    """Quadratic part, linear part beyond the first order and constant of all foreign rows, in the coordinates y."""
    group = found.group
    q, k = group.functional.rows.queries, group.functional.rows.layer.key_width
    weight = group.pooling * found.size
    curve = weight * par.curve / found.reach**2
    mixed = torch.einsum("hil,hia->hla", weight * par.mixed / (found.reach * found.lift), q)
    back = group.token.turned_back
    mixed = back(mixed)
    core = curve.new_zeros(*mixed.shape[:2], 2 * k + 1, 2 * k + 1)
    # R_l M R_l^T: the rows, then the columns
    square = back(torch.einsum("hil,hia,hib->halb", curve, q, q))
    core[..., :k, :k] = back(square.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)
    core[..., :k, -1] = mixed
    core[..., -1, :k] = mixed
    core[..., -1, -1] = (weight * par.spread / found.lift**2).sum(1)
    linear = curve.new_zeros(*mixed.shape[:2], 2 * k + 1)
    linear[..., :k] = back(torch.einsum("hil,hia->hla", weight * par.tilt / found.reach, q))
    linear[..., -1] = (weight * par.lean / found.lift).sum(1)
    return core, linear, (group.pooling * foreign_constant(found, par, nodes=nodes)).sum((0, 1))
