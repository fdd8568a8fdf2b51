"""Constants of one softmax row over a perturbation set: ranges of logits and weights, bounds of the remainder."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.conic.row import MoveSet, Row
from attnrobust.certify.shared.constants import (
    DUAL_ORDER,
    LogitNorms,
    equal_sign_slope,
    kept_curvature,
    logit_range,
    remainder_mass,
)
from attnrobust.numerics.rounding import ENTRY, FORMULA, outward
from attnrobust.numerics.suprema import pair_slope, saturating_weight

Array = Float[np.ndarray, "..."]

ANGLES = 256  # one row has few numbers: the cells of lemma 2 may be fine
SMALLEST_RANGE = 1e-9  # ranges are raised to this: below, differences of exponentials cancel
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


def row_ranges(row: Row, reach: MoveSet) -> Ranges:
    """Evaluate all constants of a row; proofs in docs/conic-certificate.md."""
    spreads = np.array([_spread(row, reach, c) for c in (row.weight, *np.eye(row.keys))])
    limit = logit_range(_logit_norms(row, reach), reach, angles=ANGLES).clamp_min(SMALLEST_RANGE)
    log_weight, weight = torch.from_numpy(row.log_weight), torch.from_numpy(row.weight)
    saturating = saturating_weight(log_weight, limit)

    def quadratic(coefficient: Tensor) -> Tensor:
        return coefficient.new_tensor(0.5 * _quadratic(row, reach, coefficient.numpy()))

    remainder, share = remainder_mass(log_weight, limit, saturating, quadratic)
    share = share.clamp_min(SMALLEST_SHARE)
    low, high = _weight_range(row, limit.numpy())
    return Ranges(
        logit=limit.numpy(), log_low=low, log_high=high, value=outward(row.value_range(reach), FORMULA),
        bilinear=outward(row.bilinear_norm * reach.token * math.sqrt(_spread(row, reach, np.ones(row.keys))), FORMULA),
        spread=spreads, remainder=float(remainder), share=float(share), saturating=saturating.numpy(),
        flat=kept_curvature(weight, limit, remainder).numpy(),
        slope_opposite=pair_slope(log_weight, limit).numpy(),
        slope_same=equal_sign_slope(weight, limit, share).numpy(),
    )  # fmt: skip


# ---- logits and weights --------------------------------------------------------------------------------------------


def _logit_norms(row: Row, reach: MoveSet) -> LogitNorms:
    """Norms of the blocks of every l_j and of its bilinear part."""
    own, other = row.direction_norms(2.0)
    scale = row.bilinear_norm * row.query_moves
    norms = [own, other, row.numerical_radius * np.abs(row.mixing_own), scale * row.mixing_rest(2.0)]
    if reach.norm is not None:
        own, other = row.direction_norms(DUAL_ORDER[reach.norm], by_token=True)
        norms += [own + other, scale * row.mixing_rest(1.0)]
    return LogitNorms(*(torch.from_numpy(norm) for norm in norms))


def _weight_range(row: Row, logit: Array) -> tuple[Array, Array]:
    """Bounds of ``log P_j = log w_j + u_j - log sum_l w_l e^(u_l)``; also P_j <= w_j e^(u_j) and P_j <= 1."""
    raised, lowered = row.log_weight + logit, row.log_weight - logit
    low = lowered - np.logaddexp(lowered, _others(raised))
    high = np.minimum(np.minimum(raised - np.logaddexp(raised, _others(lowered)), raised), 0.0)
    pad = ENTRY * (1.0 + np.abs(logit) + np.abs(row.log_weight))
    return low - pad, np.minimum(high + pad, 0.0)


def _others(logs: Array) -> Array:
    """``log sum_(l != j) e^(logs_l)`` for every j."""
    grid = np.where(np.eye(len(logs), dtype=bool), -np.inf, logs[None, :])
    return np.asarray(np.logaddexp.reduce(grid, axis=1))


# ---- quadratic bounds ----------------------------------------------------------------------------------------------


def _spread(row: Row, reach: MoveSet, c: Array) -> float:
    """s_c >= ``sum_j c_j |sum_l C_jl delta_l|^2``: q_j is at most ``|delta_i A|`` times that length."""
    weighted = np.sqrt(c)[:, None] * row.mixing
    by_norm = float(np.linalg.norm(weighted, 2)) ** 2 * reach.frobenius**2
    by_token = float(c @ np.abs(row.mixing).sum(axis=1) ** 2) * reach.token**2
    return outward(min(by_norm, by_token), FORMULA)


def _quadratic(row: Row, reach: MoveSet, c: Array) -> float:
    """Bound of ``sum_j c_j u_j^2``: ``(sum c x^2)^(1/2) + (sum c q^2)^(1/2)``, squared."""
    if not np.isfinite(c).all():
        return math.inf
    with np.errstate(over="ignore"):
        linear = float(np.linalg.norm(np.sqrt(c)[:, None] * row.directions.reshape(row.keys, -1), 2)) * reach.frobenius
        bilinear = row.bilinear_norm * reach.token * math.sqrt(_spread(row, reach, c)) * row.query_moves
        return outward((linear + bilinear) * (linear + bilinear), FORMULA)  # a product overflows, a power raises
