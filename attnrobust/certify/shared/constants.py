"""Constants of softmax rows over a perturbation set: ranges of logit changes, mass of the remainder, pair slopes.

Lemmas 2 to 6 of docs/margin-certificate.md, once: the shapes are the caller's (all rows of all heads, one row, or the
rows of some candidate tokens), tokens run over the last dimension.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.exponential import largest_remainder, phi_negative, psi_slope_negative, weighted_phi
from attnrobust.numerics.rounding import ENTRY, FORMULA, inward, nan_is_infinite, outward

ANGLES = 24  # cells of the share of the budget that the query token takes: within 0.1 %
DUAL_ORDER = {"l2": 2.0, "linf": 1.0, "l1": math.inf}  # of the norm dual to a token norm


@dataclass(frozen=True)
class MoveBudget:
    """One perturbation set in the norms that the lemmas use.

    Args:
        frobenius: r with ``||Delta||_F <= r``.
        token: Bound of every ``|delta_j|_2``.
        epsilon: The threat's own size.
    """

    frobenius: float
    token: float
    epsilon: float

    def scaled(self, factor: float) -> "MoveBudget":
        """The set of another radius; up to rounding, for searches."""
        return MoveBudget(factor * self.frobenius, factor * self.token, factor * self.epsilon)


@dataclass(frozen=True, eq=False)
class LogitNorms:
    """Norms behind the range of one logit change ``u_j = l_j.Delta + delta_i A (delta_j - dbar)``; no radius in them.

    Args:
        own: Norm of the delta_i-block of l_j.
        other: Norm of its other blocks together.
        diagonal: ``num |[i = j] - w_i|``, num the numerical radius of A; 0 where i does not move.
        mixed: ``||A||`` times the norm of ``e_j - w`` on the other movable tokens; 0 where i does not move.
        dual: Sum over tokens of the blocks' dual norms for per-token sets, else None.
        dual_mixed: As ``mixed`` with the sum of absolute values for the norm.
    """

    own: Float[Tensor, "*s n"]
    other: Float[Tensor, "*s n"]
    diagonal: Float[Tensor, "*s n"]
    mixed: Float[Tensor, "*s n"]
    dual: Float[Tensor, "*s n"] | None = None
    dual_mixed: Float[Tensor, "*s n"] | None = None


def logit_range(norms: LogitNorms, budget: MoveBudget, *, angles: int = ANGLES) -> Float[Tensor, "*s n"]:
    """Upper bound U of ``sup |u_j|`` over the set.

    With |delta_i| = r sin(a): ``|l_j.Delta| <= r (own sin a + other cos a)`` and
    ``|delta_i A (delta_j - dbar)| <= r^2 sin a (diagonal sin a + mixed cos a)``. The sum F(a) is evaluated at nodes of
    distance h; between them it exceeds the larger node by at most ``h^2 / 8 sup |F''|`` with
    ``|F''| <= r |(own, other)| + 2 r^2 |(diagonal, mixed)|``. The largest linear part plus the largest bilinear part,
    ``r |(own, other)| + r^2 (diagonal + |(diagonal, mixed)|) / 2``, is another bound, and for per-token sets so is the
    sum of the blocks' dual norms.

    Args:
        norms: Norms of the logit changes.
        budget: The set.
        angles: Cells of a; the bound is at most ``(pi / (4 angles))^2`` too large for it.

    References:
        Derived; docs/margin-certificate.md, lemma 2.
    """
    r, spacing = budget.frobenius, 0.5 * math.pi / angles
    linear, bilinear = torch.hypot(norms.own, norms.other), torch.hypot(norms.diagonal, norms.mixed)
    apart = r * linear + 0.5 * r * r * (norms.diagonal + bilinear)
    best = torch.zeros_like(apart)
    for sine, cosine in ((math.sin(k * spacing), math.cos(k * spacing)) for k in range(angles + 1)):
        value = r * (norms.own * sine + norms.other * cosine)
        best = torch.maximum(best, value + r * r * sine * (norms.diagonal * sine + norms.mixed * cosine))
    best = torch.minimum(best + spacing**2 / 8.0 * (r * linear + 2.0 * r * r * bilinear), apart)
    if norms.dual is not None and norms.dual_mixed is not None:
        by_token = budget.epsilon * norms.dual + budget.token**2 * (norms.diagonal + norms.dual_mixed)
        best = torch.minimum(best, by_token)
    return outward(best, FORMULA)


def remainder_mass(
    log_weight: Float[Tensor, "*s n"],
    limit: Float[Tensor, "*s n"],
    saturating: Float[Tensor, "*s n"],
    quadratic: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """Upper bounds of ``P = E psi(u)``, possibly infinite, and of ``p = P / (1 + P)`` over the set.

    ``2 P <= sup sum_j w_j phi(U_j) u_j^2`` and ``2 p <= sup sum_j f_j u_j^2``; P is also bounded by the ranges alone.

    Args:
        log_weight: ``log w``; -inf for hidden tokens.
        limit: U.
        saturating: f, ``saturating_weight`` at these weights and limits.
        quadratic: Coefficients c >= 0 to an upper bound of ``sup sum_j c_j u_j^2 / 2``; infinite entries give infinity.

    References:
        Derived; docs/margin-certificate.md, lemma 4.
    """
    by_range = largest_remainder(log_weight.exp(), limit)
    by_energy = nan_is_infinite(quadratic(weighted_phi(log_weight, limit)))
    remainder = outward(torch.minimum(by_energy, by_range), FORMULA)
    ratio = torch.where(torch.isinf(remainder), 1.0, remainder / (1.0 + remainder))
    share = torch.minimum(outward(ratio, ENTRY), nan_is_infinite(quadratic(saturating))).clamp_max(1.0)
    return remainder, share


def kept_curvature(
    weight: Float[Tensor, "*s n"], limit: Float[Tensor, "*s n"], remainder: Float[Tensor, "*s"]
) -> Float[Tensor, "*s n"]:
    """Lower bound ``w phi(-U) / (1 + P)`` of ``2 w psi(u) / (u^2 (1 + P))`` on the set: the curvature that stays.

    References:
        Derived; docs/margin-certificate.md, theorem 1, step 2.
    """
    kept = 1.0 / (1.0 + remainder)  # 0 where the remainder overflowed
    return inward(weight * phi_negative(limit) * kept[..., None], ENTRY)


def equal_sign_slope(
    weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"], share: Float[Tensor, "*#s"]
) -> Float[Tensor, "*s"]:
    """``w (p + (1 - p) psi(-U) / U)``: slope of ``p E[u t] - (1 - p) E[psi t]`` in |u t| where u and t agree in sign.

    Where they differ it is ``suprema.pair_slope``.

    References:
        Derived; docs/margin-certificate.md, lemma 5.
    """
    return outward(weight * (share + (1.0 - share) * psi_slope_negative(limit)), ENTRY)


def shifted_slopes(
    weight: Float[Tensor, "*s"], opposite: Float[Tensor, "*s"], same: Float[Tensor, "*s"]
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """The part of ``-E[u t]`` that joins the remainder so that its two slopes even out, and their larger one then.

    References:
        Derived; docs/margin-certificate.md, lemma 6.
    """
    shift = torch.minimum(weight, 0.5 * (same - opposite).clamp_min(0.0))
    return shift, torch.maximum(opposite + shift, same - shift)
