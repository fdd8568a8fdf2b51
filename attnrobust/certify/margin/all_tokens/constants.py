"""Constants of the margin certificate on one perturbation set: lemmas 2 to 6 for all rows and all movable tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.rows import GRAM_LIMIT, MarginRows, direction_gram, own_block, rest_norm
from attnrobust.certify.shared.constants import (
    DUAL_ORDER,
    LogitNorms,
    MoveBudget,
    equal_sign_slope,
    kept_curvature,
    logit_range,
    remainder_mass,
)
from attnrobust.certify.shared.pair_forms import key_gradient_norms
from attnrobust.certify.shared.softmax_rows import own_entries, own_values
from attnrobust.numerics.eigenvalues import gram_eigenvalue, power_eigenvalue, spread_eigenvalue
from attnrobust.numerics.rounding import FORMULA, outward
from attnrobust.numerics.suprema import pair_slope, saturating_weight
from attnrobust.numerics.triangle import triangle
from attnrobust.threats.moves import MoveThreat, PerTokenBall


@dataclass(frozen=True, eq=False)
class RowGeometry:
    """Norms of the directions l_j that no radius changes.

    Args:
        norms: What the ranges of the logit changes need.
        gram: Gram tensor of the l_j where it is small enough, else None.
    """

    norms: LogitNorms
    gram: Float[Tensor, "h q n n"] | None


def row_geometry(rows: MarginRows, threat: MoveThreat) -> RowGeometry:
    """Norms of the l_j for one threat."""
    own = rows.own_reach[:, None]
    norm = rows.norm[:, None, None] * own
    dual = dual_mixed = None
    if isinstance(threat, PerTokenBall):
        order, token_sum = DUAL_ORDER[threat.norm], _token_sum(rows)
        dual = own_block(rows, order) + _key_duals(rows, order, token_sum)
        dual_mixed = norm * token_sum
    norms = LogitNorms(
        own=own_block(rows, 2.0) * own, other=_key_blocks(rows),
        diagonal=rows.numerical[:, None, None] * rows.own.abs() * own.square(),
        mixed=norm * rest_norm(rows.weight, rows.reach.square(), rows.at),
        dual=dual, dual_mixed=dual_mixed,
    )  # fmt: skip
    return RowGeometry(norms, direction_gram(rows) if rows.n <= GRAM_LIMIT else None)


def _key_blocks(rows: MarginRows) -> Float[Tensor, "h q n"]:
    """Norm of the blocks ``(e_j - w)_l beta_il`` of the movable tokens l other than i together."""
    if rows.layer.rotary is None:
        rest = rest_norm(rows.weight, rows.reach.square(), rows.at)
        plain: Tensor = rest * torch.linalg.vector_norm(rows.beta, dim=-1)[..., None]
        return plain
    return rest_norm(rows.weight, (rows.reach * rows.pair_norm).square(), rows.at)


def _key_duals(rows: MarginRows, order: float, token_sum: Tensor) -> Float[Tensor, "h q n"]:
    """Sum over those blocks of their dual norms."""
    if rows.layer.rotary is None:
        plain: Tensor = token_sum * torch.linalg.vector_norm(rows.beta, ord=order, dim=-1)[..., None]
        return plain
    size = outward(key_gradient_norms(rows.layer, rows.queries, rows.n, order=order), FORMULA)
    return _token_sum(rows, size)


def _token_sum(rows: MarginRows, size: Tensor | None = None) -> Tensor:
    """``sum_l |(e_j - w)_l| size_il`` over movable tokens other than i; size 1 where it is not given."""
    w, m = rows.weight, rows.movable
    eye = own_entries(w, rows.at)
    if size is not None:
        m = m * size
        own = own_values(w, rows.at) * own_values(m, rows.at)
        return ((w * m).sum(-1) - own)[..., None] + (1.0 - 2.0 * w) * m * (1.0 - eye)
    total = (w @ m)[..., None] - (own_values(w, rows.at) * rows.own_movable)[..., None]  # sum over T without i
    return total + (1.0 - 2.0 * w) * m * (1.0 - eye)


@dataclass(frozen=True, eq=False)
class Constants:
    """Everything that depends on the radius and not on the class; (h, q, n) per token, (h, q) per row.

    Args:
        budget: The perturbation set.
        limit: U, bound of |u_j|.
        saturating: f with ``w psi(u) / (1 + P) <= f u^2 / 2``.
        slope: First entry of kp (u > 0, t < 0).
        slope_same: Second entry of kp (u, t of equal sign).
        curvature: ``w phi(-U) inf 1/(1+P)``: negative curvature that stays.
        share: pbar, bound of ``p = P / (1 + P)``.
        spread: ``r sqrt(lambda_max(diag w - w w^T))``: bound of ``(E |delta_j - dbar|^2)^{1/2}``.
    """

    budget: MoveBudget
    limit: Float[Tensor, "h q n"]
    saturating: Float[Tensor, "h q n"]
    slope: Float[Tensor, "h q n"]
    slope_same: Float[Tensor, "h q n"]
    curvature: Float[Tensor, "h q n"]
    share: Float[Tensor, "h q"]
    spread: Float[Tensor, "h q"]


def largest_quadratic(rows: MarginRows, geo: RowGeometry, coefficient: Tensor) -> Float[Tensor, "h q"]:
    """Upper bound of ``lambda_max(sum_j c_j l_j l_j^T)`` per row."""
    if geo.gram is not None:
        return gram_eigenvalue(geo.gram, coefficient)
    if rows.layer.rotary is None:
        key = spread_eigenvalue(coefficient, rows.weight, rows.reach) * (rows.beta**2).sum(-1)
    else:
        key = spread_eigenvalue(coefficient, rows.weight, rows.reach * rows.pair_norm)
    query = _query_eigenvalue(rows, coefficient) * rows.own_reach.square()
    return outward((key.sqrt() + query.sqrt()) ** 2, FORMULA)


def _query_eigenvalue(rows: MarginRows, coefficient: Tensor) -> Tensor:
    """``lambda_max(sum_j c_j a_j a_j^T)``, ``a_j = alpha_j - mean alpha = w_q (k_j - mean k)``, from k x k matrices."""
    finite = torch.isfinite(coefficient).all(-1)
    c = torch.where(finite[..., None], coefficient, 0.0)
    keys = rows.keys
    mean = rows.weight @ keys
    first = c @ keys
    few = rows.n <= GRAM_LIMIT or c.shape[1] < keys.shape[-1]  # rows
    second = torch.einsum("hij,hja,hjb->hiab", c, keys, keys) if few else _second_moment(c, keys)
    total = c.sum(-1)[..., None, None]
    cross = first[..., :, None] * mean[..., None, :]
    moment = second - cross - cross.mT + total * mean[..., :, None] * mean[..., None, :]
    # w_q S w_q^T has the eigenvalues of R S R^T, w_q = Q R; S is in turned coordinates.
    small = triangle(rows.layer.w_q)
    turned = rows.layer.turned(small[:, :, None].expand(-1, -1, c.shape[1], -1), rows.at).transpose(1, 2)
    inner = turned @ moment @ turned.mT
    scale = torch.linalg.matrix_norm(second) * torch.linalg.matrix_norm(small)[:, None] ** 2
    value = (power_eigenvalue(inner, squarings=3) + FORMULA * scale) * rows.own_movable
    return torch.where(finite & torch.isfinite(value), value, torch.inf)  # overflowed squares bound nothing


def _second_moment(c: Tensor, keys: Tensor) -> Tensor:
    h, n, k = keys.shape
    products = (keys[..., :, None] * keys[..., None, :]).reshape(h, n, k * k)
    return (c @ products).reshape(h, n, k, k)


Largest = Callable[[MarginRows, RowGeometry, Tensor], Float[Tensor, "h q"]]


def constants(
    rows: MarginRows, geo: RowGeometry, budget: MoveBudget, *, largest: Largest = largest_quadratic
) -> Constants:
    """All radius-dependent constants; see the attributes of ``Constants`` and lemmas 2 to 6 of the documentation.

    Args:
        rows: Clean quantities.
        geo: Norms of the directions l_j.
        budget: The set.
        largest: Upper bound of ``lambda_max(sum_j c_j l_j l_j^T)``; a search may estimate it, a proof not.
    """
    r, rho, norm = budget.frobenius, budget.token, rows.norm[:, None] * rows.own_reach
    limit = logit_range(geo.norms, budget).masked_fill(torch.isneginf(rows.log_weight), 0.0)
    saturating = saturating_weight(rows.log_weight, limit)

    def quadratic(coefficient: Tensor) -> Tensor:
        linear = largest(rows, geo, coefficient)
        spread = spread_eigenvalue(coefficient, rows.weight, rows.reach)
        spread = torch.where(rows.own_movable > 0, spread, 0.0)
        return 0.5 * r * r * (linear.sqrt() + rho * norm * spread.sqrt()) ** 2

    remainder, share = remainder_mass(rows.log_weight, limit, saturating, quadratic)
    spread = spread_eigenvalue(rows.weight, rows.weight, rows.reach)
    heaviest = (rows.weight * rows.reach.square()).amax(-1) * r * r
    energy = torch.minimum(spread * r * r, torch.minimum(heaviest, heaviest.new_tensor(rho**2)))
    return Constants(
        budget=budget, limit=limit, saturating=saturating, slope=pair_slope(rows.log_weight, limit),
        slope_same=equal_sign_slope(rows.weight, limit, share[..., None]),
        curvature=kept_curvature(rows.weight, limit, remainder), share=share, spread=energy.sqrt(),
    )  # fmt: skip
