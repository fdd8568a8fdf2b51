"""Constants of the margin certificate on one perturbation set: ranges of logit changes, mass of the remainder."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.rows import GRAM_LIMIT, CleanRows, direction_gram, own_block
from attnrobust.certify.margin.scalar import largest_remainder, phi_negative, psi, saturating_coefficient, weighted_phi
from attnrobust.numerics.eigenvalues import gram_eigenvalue, spread_eigenvalue
from attnrobust.threats.moves import MoveThreat, PerTokenBall

ANGLES = 24  # cells of the share of the budget that the query token takes


@dataclass(frozen=True, eq=False)
class Geometry:
    """Norms of the directions l_j that no radius changes.

    Args:
        own: Norm of the delta_i-block of l_j.
        other: Norm of its other blocks.
        gram: Gram tensor of the l_j where it is small enough, else None.
        dual_own: Dual norm of the delta_i-block for per-token threats, else None.
        dual_other: Sum over the other tokens of dual norms of the blocks.
        token_sum: ``sum_l |(e_j - w)_l|`` over movable tokens other than i.
    """

    own: Float[Tensor, "h n n"]
    other: Float[Tensor, "h n n"]
    gram: Float[Tensor, "h n n n"] | None
    dual_own: Float[Tensor, "h n n"] | None
    dual_other: Float[Tensor, "h n n"] | None
    token_sum: Float[Tensor, "h n n"] | None


def geometry(rows: CleanRows, threat: MoveThreat) -> Geometry:
    """Norms of the l_j for one threat."""
    length = torch.linalg.vector_norm(rows.beta, dim=-1)[..., None]
    gram = direction_gram(rows) if rows.n <= GRAM_LIMIT else None
    dual_own = dual_other = token_sum = None
    if isinstance(threat, PerTokenBall):
        dual = {"l2": 2.0, "linf": 1.0, "l1": math.inf}[threat.norm]
        token_sum = _token_sum(rows)
        dual_own = own_block(rows, dual)
        dual_other = token_sum * torch.linalg.vector_norm(rows.beta, ord=dual, dim=-1)[..., None]
    return Geometry(
        own=own_block(rows, 2.0), other=rows.rest * length, gram=gram, dual_own=dual_own, dual_other=dual_other,
        token_sum=token_sum,
    )  # fmt: skip


def _token_sum(rows: CleanRows) -> Tensor:
    w, m = rows.weight, rows.movable
    eye = torch.eye(rows.n, dtype=w.dtype, device=w.device)
    total = (w @ m)[..., None] - (w.diagonal(dim1=1, dim2=2) * m)[..., None]  # sum over T without i
    return total + (1.0 - 2.0 * w) * m * (1.0 - eye)


@dataclass(frozen=True, eq=False)
class Budget:
    """One perturbation set in the norms that the lemmas use.

    Args:
        frobenius: r with ``||Delta||_F <= r``.
        token: Bound of every ``|delta_j|_2``.
        epsilon: The threat's own size.
    """

    frobenius: float
    token: float
    epsilon: float


@dataclass(frozen=True, eq=False)
class Constants:
    """Everything that depends on the radius and not on the class; (h, n, n) per token, (h, n) per row.

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

    budget: Budget
    limit: Float[Tensor, "h n n"]
    saturating: Float[Tensor, "h n n"]
    slope: Float[Tensor, "h n n"]
    slope_same: Float[Tensor, "h n n"]
    curvature: Float[Tensor, "h n n"]
    share: Float[Tensor, "h n"]
    spread: Float[Tensor, "h n"]


def logit_range(rows: CleanRows, geo: Geometry, budget: Budget) -> Float[Tensor, "h n n"]:
    """Upper bound U of ``sup |u_j|`` over the set (lemma 2 of docs/margin-certificate.md).

    With |delta_i| = r sin(a): ``|l_j.Delta| <= r (own sin a + other cos a)`` and
    ``|delta_i A (delta_j - dbar)| <= r^2 sin a (num |own_j| sin a + ||A|| rest cos a)``. The sum F(a) is evaluated at
    nodes of distance h; between them it exceeds the larger node by at most ``h^2 / 8 sup |F''|`` with
    ``|F''| <= r |(own, other)| + 2 r^2 |(num own_j, ||A|| rest)|``. Per-token sets use dual norms as well.
    """
    r = budget.frobenius
    angle = torch.linspace(0.0, 0.5 * math.pi, ANGLES + 1, dtype=geo.own.dtype, device=geo.own.device)
    numerical, norm = rows.numerical[:, None, None], rows.norm[:, None, None]
    best = geo.own.new_zeros(geo.own.shape)
    diagonal = numerical * rows.own.abs()
    mixed = norm * rows.rest * rows.movable[:, None]
    for sine, cosine in zip(angle.sin().tolist(), angle.cos().tolist(), strict=True):
        value = r * (geo.own * sine + geo.other * cosine) + r * r * sine * (diagonal * sine + mixed * cosine)
        best = torch.maximum(best, value)
    second = r * torch.hypot(geo.own, geo.other) + 2.0 * r * r * torch.hypot(diagonal, mixed)
    best = best + (0.5 * math.pi / ANGLES) ** 2 / 8.0 * second
    if geo.dual_own is not None and geo.dual_other is not None and geo.token_sum is not None:
        eps, rho = budget.epsilon, budget.token
        bilinear = rho * rho * (diagonal + norm * geo.token_sum * rows.movable[:, None])
        best = torch.minimum(best, eps * (geo.dual_own + geo.dual_other) + bilinear)
    hidden = torch.isneginf(rows.log_weight)
    return (best * (1.0 + 1e-10)).masked_fill(hidden, 0.0)


def largest_quadratic(rows: CleanRows, geo: Geometry, coefficient: Tensor) -> Float[Tensor, "h n"]:
    """Upper bound of ``lambda_max(sum_j c_j l_j l_j^T)`` per row."""
    if geo.gram is not None:
        return gram_eigenvalue(geo.gram, coefficient)
    key = spread_eigenvalue(coefficient, rows.weight, rows.movable) * (rows.beta**2).sum(-1)
    query = _query_eigenvalue(rows, coefficient)
    return (key.sqrt() + query.sqrt()) ** 2 * (1.0 + 1e-10)


def _query_eigenvalue(rows: CleanRows, coefficient: Tensor) -> Tensor:
    """``lambda_max(sum_j c_j a_j a_j^T)``, ``a_j = alpha_j - mean alpha = w_q (k_j - mean k)``, from k x k matrices."""
    finite = torch.isfinite(coefficient).all(-1)
    c = torch.where(finite[..., None], coefficient, 0.0)
    keys = rows.keys
    mean = rows.weight @ keys
    first = c @ keys
    second = torch.einsum("hij,hja,hjb->hiab", c, keys, keys) if rows.n <= GRAM_LIMIT else _second_moment(c, keys)
    total = c.sum(-1)[..., None, None]
    cross = first[..., :, None] * mean[..., None, :]
    moment = second - cross - cross.mT + total * mean[..., :, None] * mean[..., None, :]
    # w_q S w_q^T has the eigenvalues of R S R^T, w_q = Q R.
    triangle = torch.linalg.qr(rows.layer.w_q, mode="r").R
    inner = triangle[:, None] @ moment @ triangle.mT[:, None]
    scale = torch.linalg.matrix_norm(second) * torch.linalg.matrix_norm(triangle)[:, None] ** 2
    size = torch.linalg.matrix_norm(inner).clamp_min(1e-300)
    power = inner / size[..., None, None]
    for _ in range(2):
        power = power @ power
    value = (size * torch.linalg.matrix_norm(power @ power) ** 0.125 + 1e-10 * scale) * rows.movable
    return torch.where(finite & torch.isfinite(value), value, torch.inf)  # overflowed squares bound nothing


def _second_moment(c: Tensor, keys: Tensor) -> Tensor:
    h, n, k = keys.shape
    products = (keys[..., :, None] * keys[..., None, :]).reshape(h, n, k * k)
    return (c @ products).reshape(h, n, k, k)


def constants(rows: CleanRows, geo: Geometry, budget: Budget) -> Constants:
    """All radius-dependent constants; see the attributes of ``Constants`` and lemmas 2 to 6 of the documentation."""
    r = budget.frobenius
    limit = logit_range(rows, geo, budget)
    saturating, slope = saturating_coefficient(rows.log_weight, limit)
    remainder, share = _remainder_mass(rows, geo, budget, limit, saturating)
    negative = phi_negative(limit)
    flat = psi(-limit) / limit.clamp_min(1e-150)
    flat = torch.where(limit < 1e-3, 0.5 * limit, flat)
    kept = 1.0 / (1.0 + remainder)  # 0 where the remainder overflowed
    same = rows.weight * (share[..., None] + (1.0 - share[..., None]) * flat)
    spread = spread_eigenvalue(rows.weight, rows.weight, rows.movable)
    heaviest = (rows.weight * rows.movable).amax(-1) * r * r
    energy = torch.minimum(spread * r * r, torch.minimum(heaviest, heaviest.new_tensor(budget.token**2)))
    return Constants(
        budget=budget, limit=limit, saturating=saturating, slope=slope, slope_same=same,
        curvature=rows.weight * negative * kept[..., None], share=share, spread=energy.sqrt(),
    )  # fmt: skip


def _remainder_mass(
    rows: CleanRows, geo: Geometry, budget: Budget, limit: Tensor, saturating: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds of ``P = E psi(u)`` (possibly inf) and of ``p = P / (1 + P)`` over the set."""
    r, rho = budget.frobenius, budget.token
    norm = rows.norm[:, None]

    def quadratic(coefficient: Tensor) -> Tensor:
        linear = largest_quadratic(rows, geo, coefficient)
        spread = spread_eigenvalue(coefficient, rows.weight, rows.movable)
        spread = torch.where(rows.movable > 0, spread, 0.0)
        return 0.5 * r * r * (linear.sqrt() + rho * norm * spread.sqrt()) ** 2

    by_range = largest_remainder(rows.weight, limit)
    remainder = torch.minimum(quadratic(weighted_phi(rows.log_weight, limit)), by_range) * (1.0 + 1e-10)
    ratio = torch.where(torch.isinf(remainder), torch.ones_like(remainder), remainder / (1.0 + remainder))
    share = torch.minimum(ratio * (1.0 + 1e-12), quadratic(saturating)).clamp_max(1.0)
    return remainder, share
