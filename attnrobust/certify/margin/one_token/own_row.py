"""The moving token's own row: every logit of it changes through its query; a majorant and a range in few numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.one_token.rows import TokenFunctional, TokenRows
from attnrobust.certify.shared.constants import (
    LogitNorms,
    MoveBudget,
    equal_sign_slope,
    kept_curvature,
    logit_range,
    remainder_mass,
    shifted_slopes,
)
from attnrobust.numerics.eigenvalues import symmetric_top
from attnrobust.numerics.rounding import ENTRY, outward
from attnrobust.numerics.suprema import pair_slope, saturating_weight

BISECTIONS = 40  # of the largest average
AVERAGE_ERROR = 1e-11  # of it, in units of the largest advantage


@dataclass(frozen=True, eq=False)
class OwnConstants:
    """Constants of row l while only token l moves, |delta| <= radius; same meaning as in ``Constants``.

    Args:
        radius: The budget.
        limit: U_j.
        saturating: f_j.
        curvature: ``w_j phi(-U_j) inf 1/(1+P)``.
        slope: First entry of kp at j = l.
        slope_same: Second entry of kp at j = l.
        share: pbar.
        heaviest: Largest weight that the row can give to token l.
    """

    radius: float
    limit: Float[Tensor, "h l n"]
    saturating: Float[Tensor, "h l n"]
    curvature: Float[Tensor, "h l n"]
    slope: Float[Tensor, "h l"]
    slope_same: Float[Tensor, "h l"]
    share: Float[Tensor, "h l"]
    heaviest: Float[Tensor, "h l"]


def own_constants(token: TokenRows, radius: float) -> OwnConstants:
    """Bounds over ``|delta| <= radius`` of ``u_j = l_j.delta + own_j delta A delta`` and of the remainder's mass."""
    numerical, hidden = token.rows.numerical[:, None], torch.isneginf(token.log_weight)
    diagonal, budget = numerical[..., None] * token.own.abs(), MoveBudget(radius, radius, radius)
    none = torch.zeros_like(diagonal)
    limit = logit_range(LogitNorms(token.norm, none, diagonal, none), budget).masked_fill(hidden, 0.0)
    saturating = saturating_weight(token.log_weight, limit)

    def quadratic(coefficient: Tensor) -> Tensor:
        """``sup sum_j c_j u_j^2 / 2``."""
        finite = torch.isfinite(coefficient).all(-1)
        c = torch.where(finite[..., None], coefficient, 0.0)
        small = (token.direction * c[..., None]).mT @ token.direction
        linear = symmetric_top(token.triangle[:, None] @ small @ token.triangle.mT[:, None])
        bilinear = (c * token.own**2).sum(-1).sqrt() * radius * numerical
        return torch.where(finite, 0.5 * radius**2 * (linear.sqrt() + bilinear) ** 2, torch.inf)

    remainder, share = remainder_mass(token.log_weight, limit, saturating, quadratic)
    at, tokens = token.place, token.tokens
    self_limit, logit = limit[:, at, tokens], token.logit[:, tokens, at]
    return OwnConstants(
        radius=radius,
        limit=limit,
        saturating=saturating,
        curvature=kept_curvature(token.weight, limit, remainder),
        slope=pair_slope(token.log_weight[:, at, tokens], self_limit),
        slope_same=equal_sign_slope(token.self_weight, self_limit, share),
        share=share,
        # No logit moves by more than the largest limit, so the weight's own logit grows by at most twice that.
        heaviest=outward(torch.sigmoid(logit + 2.0 * limit.amax(-1)), ENTRY).clamp_max(1.0),
    )


def largest_average(group: TokenFunctional, const: OwnConstants) -> Float[Tensor, "h l"]:
    """Upper bound of ``sup sum_j p_j v_j`` over all logit changes with |u_j| <= U_j (lemma 13).

    The supremum c solves ``sum_j w_j e^{U_j sign(v_j - c)} (v_j - c) = 0`` (the left side falls in c); bisection keeps
    the upper end.
    """
    log_weight, v = group.token.log_weight, group.advantage
    hidden = torch.isneginf(log_weight)
    low, high = v.masked_fill(hidden, torch.inf).amin(-1), v.masked_fill(hidden, -torch.inf).amax(-1)
    scale = torch.maximum(low.abs(), high.abs())
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        gain = v - middle[..., None]
        share = torch.softmax(log_weight + const.limit * gain.sign(), dim=-1)
        above = (share * gain).sum(-1) > -ENTRY * scale
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high + AVERAGE_ERROR * scale


@dataclass(frozen=True, eq=False)
class OwnParameters:
    """Free parameters of the own row (h, l), positive but for the references; see ``Parameters``."""

    split: Float[Tensor, "h l"]
    reference: Float[Tensor, "h l"]
    value: Float[Tensor, "h l"]
    pair: Float[Tensor, "h l"]
    bilinear: Float[Tensor, "h l"]
    query_value: Float[Tensor, "h l"]
    query_mean: Float[Tensor, "h l"]


def own_start(like: Float[Tensor, "h l"]) -> OwnParameters:
    """Parameters that are reasonable everywhere."""
    one, zero = torch.ones_like(like), torch.zeros_like(like)
    return OwnParameters(0.4 * one, zero, zero, one, 0.3 * one, 2.0 * one, 2.0 * one)


@dataclass(frozen=True, eq=False)
class OwnForm:
    """The own row's majorant without its pooling weight; axes (h, l).

    Args:
        core: Quadratic part in the coordinates y.
        identity: Multiple of ``|delta|^2``.
        linear: Linear part beyond the first order, in the coordinates y.
        constant: Its constant.
    """

    core: Float[Tensor, "h l m m"]
    identity: Float[Tensor, "h l"]
    linear: Float[Tensor, "h l m"]
    constant: Float[Tensor, "h l"]


def own_form(group: TokenFunctional, const: OwnConstants, par: OwnParameters) -> OwnForm:
    """Theorem 1 for a row that only its own token moves."""
    token, layer = group.token, group.functional.rows.layer
    k, radius, length = layer.key_width, const.radius, group.functional.value_norm
    unit = radius * group.own_gradient_norm
    theta, omega = par.value * radius * length, par.reference * unit
    mine = (slice(None), token.place, token.tokens)
    shift, slope = shifted_slopes(token.self_weight, const.slope, const.slope_same)
    own, toward = token.own[mine], token.direction[mine]
    kept, weight = token.self_weight - shift, token.self_weight

    mass = group.advantage + (par.split * unit - omega)[..., None]
    mass = mass - theta[..., None] * group.at_self
    curve = mass * torch.where(mass > 0, const.saturating, const.curvature)
    curve = curve + (par.pair * length * slope)[..., None] * group.at_self
    positive = curve > 0
    eps = par.bilinear[..., None].expand_as(curve)
    eps = torch.where(positive, eps, eps.clamp_max(1.0))
    square = torch.where(positive, curve * (1.0 + eps), curve * (1.0 - eps))
    rest = torch.where(positive, curve * (1.0 + 1.0 / eps), -curve * (1.0 / eps - 1.0))

    # E[q v'] = w_l v'_l delta A delta with v' centred; d' = d - w_l theta x_l.
    weighted = weight * (group.advantage[mine] - theta * (1.0 - weight))
    mean = const.share * weighted.abs()
    first = const.share / (2.0 * par.split * unit)
    change = torch.cat([(weight * theta)[..., None] * toward, torch.zeros_like(theta)[..., None]], dim=-1)
    gradient = group.own_gradient - change
    s1 = par.query_value * length
    value = slope / (par.pair * length) + kept * own.abs() * radius / s1
    core = square.new_zeros(*square.shape[:2], 2 * k + 1, 2 * k + 1)
    core[..., : 2 * k, : 2 * k] = (token.direction * square[..., None]).mT @ token.direction
    core[..., : 2 * k, -1] -= kept[..., None] * toward
    core[..., -1, : 2 * k] -= kept[..., None] * toward
    core[..., -1, -1] += value
    core = core + first[..., None, None] * gradient[..., :, None] * gradient[..., None, :]
    bilinear = radius**2 * (rest * token.own**2).sum(-1) + kept * own.abs() * radius * s1 + mean * par.query_mean
    gram = group.functional.rows.key_gram
    core[..., k : 2 * k, k : 2 * k] += bilinear[..., None, None] * gram[:, None]
    mixed = layer.factor * weighted[..., None, None] * torch.eye(k, dtype=core.dtype, device=core.device)
    core[..., :k, k : 2 * k] += mixed
    core[..., k : 2 * k, :k] += mixed
    pull = torch.cat([(shift * theta)[..., None] * toward, (value * theta)[..., None]], dim=-1)
    return OwnForm(
        core=core,
        identity=mean / par.query_mean,
        linear=-pull - (first * omega)[..., None] * gradient,
        constant=0.5 * (value * theta**2 + first * omega**2),
    )
