"""Constants of one softmax row over a perturbation set: ranges of logits and weights, bounds of the remainder."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from attnrobust.certify.conic.row import Reach, Row
from attnrobust.certify.conic.scalar import log_phi, psi, saturation, second_difference

Array = Float[np.ndarray, "..."]

OUTWARD = 1.0 + 1e-10  # covers norms and eigenvalues of matrices of a few hundred rows
ANGLES = 64  # cells of the share of the budget that the query token takes
SMALLEST = 1e-9  # ranges are raised to this: below, differences of exponentials cancel
SMALLEST_SHARE = 1e-18  # p is scaled by its bound, which must not vanish where every weight but one underflows


@dataclass(frozen=True, eq=False)
class Ranges:
    """Constants of one row, all bounds over the whole set.

    Args:
        logit: U_j >= sup |u_j|, u the centred change of the logits.
        log_low: <= log P_j.
        log_high: >= log P_j.
        value: >= |t_j|, the change of the values.
        bilinear: Bound of the norm of q, the bilinear part of u; 0 where there is none.
        spread: s_c with ``sum_j c_j q_j^2 <= s_c |delta_i A|^2``, for c = w (first) and c = e_j.
        remainder: sbar >= E psi(u); may be infinite.
        share: pbar >= p = s / (1 + s).
        saturating: f_j with ``w_j psi(u_j) / (1 + s) <= f_j u_j^2 / 2``.
        flat: c_j <= ``w_j psi(u_j) / (1 + s) / (u_j^2 / 2)``.
        slope_opposite: k+_j: slope of the third-order term where u_j and t_j differ in sign.
        slope_same: k-_j: where they agree.
    """

    logit: Array
    log_low: Array
    log_high: Array
    value: Array
    bilinear: float
    spread: Array
    remainder: float
    share: float
    saturating: Array
    flat: Array
    slope_opposite: Array
    slope_same: Array


def row_ranges(row: Row, reach: Reach) -> Ranges:
    """Evaluate all constants of a row; proofs in docs/conic-certificate.md."""
    spreads = np.array([_spread(row, reach, c) for c in (row.weight, *np.eye(row.keys))])
    logit = np.maximum(_logit_range(row, reach) * OUTWARD, SMALLEST)
    saturating, opposite = saturation(row.log_weight, logit)
    remainder, share = _remainder(row, reach, logit, saturating)
    psi_low = psi(-logit)
    low, high = _weight_range(row, logit)
    return Ranges(
        logit=logit, log_low=low, log_high=high, value=row.value_range(reach) * OUTWARD,
        bilinear=row.bilinear_norm * reach.token * math.sqrt(_spread(row, reach, np.ones(row.keys))) * OUTWARD,
        spread=spreads, remainder=remainder, share=share, saturating=saturating,
        flat=row.weight * second_difference(-logit) / (1.0 + remainder) / OUTWARD,
        slope_opposite=opposite,
        slope_same=row.weight * (share + (1.0 - share) * psi_low / logit) * OUTWARD,
    )  # fmt: skip


# ---- logits and weights --------------------------------------------------------------------------------------------


def _logit_range(row: Row, reach: Reach) -> Array:
    """U_j: the largest ``|l_j.D| + |q_j|``, by the share of the budget that the query takes and by token norms."""
    own, others = row.direction_norms(2.0)
    bilinear_own = row.numerical_radius * np.abs(row.mixing_own)
    bilinear_rest = row.bilinear_norm * row.mixing_rest(2.0) * row.query_moves
    r, best = reach.frobenius, np.zeros(row.keys)
    angle = np.linspace(0.0, 0.5 * math.pi, ANGLES + 1)
    for sine, cosine in zip(np.sin(angle[1:]), np.cos(angle[:-1]), strict=True):
        linear = r * (own * sine + others * cosine)
        quadratic = r * r * sine * (bilinear_own * sine + bilinear_rest * cosine)
        best = np.maximum(best, linear + quadratic)
    if reach.norm is None:
        return best
    own, others = row.direction_norms({"l2": 2.0, "linf": 1.0, "l1": math.inf}[reach.norm], by_token=True)
    quadratic = bilinear_own + row.bilinear_norm * row.mixing_rest(1.0) * row.query_moves
    return np.asarray(np.minimum(best, reach.epsilon * (own + others) + reach.token**2 * quadratic))


def _weight_range(row: Row, logit: Array) -> tuple[Array, Array]:
    """Bounds of ``log P_j = log w_j + u_j - log sum_l w_l e^(u_l)``; also P_j <= w_j e^(u_j) and P_j <= 1."""
    raised, lowered = row.log_weight + logit, row.log_weight - logit
    low = lowered - np.logaddexp(lowered, _others(raised))
    high = np.minimum(np.minimum(raised - np.logaddexp(raised, _others(lowered)), raised), 0.0)
    pad = 1e-12 * (1.0 + np.abs(logit) + np.abs(row.log_weight))
    return low - pad, np.minimum(high + pad, 0.0)


def _others(logs: Array) -> Array:
    """``log sum_(l != j) e^(logs_l)`` for every j."""
    grid = np.where(np.eye(len(logs), dtype=bool), -np.inf, logs[None, :])
    return np.asarray(np.logaddexp.reduce(grid, axis=1))


# ---- quadratic bounds ----------------------------------------------------------------------------------------------


def _spread(row: Row, reach: Reach, c: Array) -> float:
    """s_c >= ``sum_j c_j |sum_l C_jl delta_l|^2``: q_j is at most ``|delta_i A|`` times that length."""
    weighted = np.sqrt(c)[:, None] * row.mixing
    by_norm = float(np.linalg.norm(weighted, 2)) ** 2 * reach.frobenius**2
    by_token = float(c @ np.abs(row.mixing).sum(axis=1) ** 2) * reach.token**2
    return min(by_norm, by_token) * OUTWARD


def _quadratic(row: Row, reach: Reach, c: Array) -> float:
    """Bound of ``sum_j c_j u_j^2``: ``(sum c x^2)^(1/2) + (sum c q^2)^(1/2)``, squared."""
    if not np.isfinite(c).all():
        return math.inf
    with np.errstate(over="ignore"):
        linear = float(np.linalg.norm(np.sqrt(c)[:, None] * row.directions.reshape(row.keys, -1), 2)) * reach.frobenius
        bilinear = row.bilinear_norm * reach.token * math.sqrt(_spread(row, reach, c)) * row.query_moves
        return (linear + bilinear) * (linear + bilinear) * OUTWARD  # a product overflows to infinity, a power raises


def _remainder(row: Row, reach: Reach, logit: Array, saturating: Array) -> tuple[float, float]:
    """``s = E psi(u)`` and ``p = s / (1 + s)`` from above."""
    largest = float(logit.max())
    by_range = math.expm1(largest) if largest < 600.0 else math.inf
    with np.errstate(over="ignore"):
        remainder = min(by_range, 0.5 * _quadratic(row, reach, np.exp(row.log_weight + log_phi(logit)))) * OUTWARD
    share = 1.0 if math.isinf(remainder) else remainder / (1.0 + remainder)
    share = min(1.0, share * OUTWARD, 0.5 * _quadratic(row, reach, saturating) * OUTWARD)
    return remainder, max(share, SMALLEST_SHARE)
