"""Suprema over an interval of quotients of the exponential remainder, each from above and sharp.

Two of them rise to one peak and fall beyond (F1 and F2 of docs/margin-certificate.md, lemma 3): the peak is enclosed by
Newton's method, and between the ends of the enclosure the slope of the quotient's logarithm is bounded. With
``kappa = (log phi)'``, which increases from 1/3 to 1, that slope is ``kappa - (psi'/psi) s``, where
``psi'/psi = kappa + 2/u`` falls and ``s = w psi / (1 + w psi)`` rises.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.exponential import FAR, LOG2, log_phi, log_psi
from attnrobust.numerics.rounding import ENTRY, SMALLEST_UNIT, nonzero, outward

CELLS = 24  # of the interval of the growing weight; any number of them gives a bound
SHORT, FEW = 1.0, 3  # up to this limit the quotient is nearly linear: a third of the cells is as good
NEWTON_STEPS = 4  # towards a peak; any enclosure gives a bound
BRACKET = 1e-3  # half the relative width of an enclosure
LEAST_SLOPE = 1e-2  # of a Newton step
BLOCK = 2**14  # numbers at once: intermediate results stay in the cache
FLAT = 0.05  # below, kappa comes from kappa(0) = 1/3 and kappa' <= 1/4; both peaks lie beyond 1/4 as w <= 1
SMALLEST_CUT = 1e-12  # of 1 - w u as a divisor; beyond its zero only the rise is used
SLOPE_ERROR = 1e-12  # absolute rounding of kappa
LOG3 = math.log(3.0)

Level = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Value = Callable[[Tensor, Tensor], Tensor]
Peak = Callable[[Tensor, Tensor, Tensor], Tensor]


def saturating_weight(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``f = sup over 0 < u <= limit of 2 w psi / (u^2 (1 + w psi))``, at least w.

    Then ``w psi(u) / (1 + w psi(u)) <= f u^2 / 2`` for |u| <= limit.

    Args:
        log_weight: ``log w``; -inf (hidden token) gives zeros.
        limit: Largest |u|, >= 0.

    References:
        Derived; docs/margin-certificate.md, lemma 3.
    """
    return _blockwise(_saturating, log_weight, limit)


def pair_slope(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``sup over 0 < u <= limit of w (psi / u) (1 - w u)_+ / (1 + w psi)``, by the same two steps.

    Args:
        log_weight: ``log w``; -inf (hidden token) gives zeros.
        limit: Largest |u|, >= 0.

    References:
        Derived; docs/margin-certificate.md, lemmas 3 and 5.
    """
    return _blockwise(_pair_slope, log_weight, limit)


def growing_weight(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``sup over |u| <= limit of w |e^u - 1| / (|u| (1 + P))``, at least w.

    On a cell 0 <= a <= u <= b the quotient is at most ``w (e^b - 1) / (b (1 + w psi(a)))``, and at most 1/a because
    ``w e^u <= E e^u = 1 + P``; for negative u it is at most w.

    References:
        Derived; docs/displacement-certificate.md, equation 5a.
    """
    return _blockwise(_growing, log_weight, limit)


def _blockwise(function: Callable[[Tensor, Tensor], Tensor], log_weight: Tensor, limit: Tensor) -> Tensor:
    flat, rest = log_weight.reshape(-1), limit.expand_as(log_weight).reshape(-1)
    hidden = torch.isneginf(flat)
    blocks = zip(flat.masked_fill(hidden, 0.0).split(BLOCK), nonzero(rest, SMALLEST_UNIT).split(BLOCK), strict=True)
    return torch.cat([function(*block) for block in blocks]).masked_fill(hidden, 0.0).reshape(log_weight.shape)


def _growing(log_weight: Float[Tensor, "m"], limit: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    best = log_weight.exp()
    left, before = torch.zeros_like(limit), torch.zeros_like(limit)  # before: log(1 + w psi(left))
    cells = CELLS if float(limit.max()) > SHORT else CELLS // FEW
    for cell in range(1, cells + 1):
        right = limit * (cell / cells) ** 1.5
        rate = right + torch.log(-torch.expm1(-right) / nonzero(right))  # log((e^u - 1) / u), -inf at 0
        grown = torch.exp(log_weight + rate - before)
        if cell > 1:
            grown = torch.minimum(grown, 1.0 / nonzero(left))
        best = torch.maximum(best, grown)
        left, before = right, _log_one_plus(log_weight + log_psi(right))
    return outward(best, ENTRY)


def _log_phi_slope(u: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of ``kappa(u) = (log phi)'(u) = psi'/psi - 2/u``, which increases from 1/3 to 1."""
    safe = u.clamp(FLAT, FAR)
    rise = torch.expm1(safe)
    slope = rise / (rise - safe) - 2.0 / u.clamp_min(FLAT)  # beyond FAR psi'/psi - 1 < 2e-16
    near = u < FLAT
    low = torch.where(near, 1.0 / 3.0, slope - SLOPE_ERROR)
    return low, torch.where(near, 1.0 / 3.0 + 0.25 * u, slope + SLOPE_ERROR).clamp_max(1.0)


@dataclass(frozen=True)
class _Node:
    """Values at one u per entry.

    Args:
        u: The place.
        log_value: Logarithm of the quotient.
        rate: ``(psi'/psi)`` from below and above.
        share: ``w psi / (1 + w psi)``.
    """

    u: Tensor
    log_value: Tensor
    rate: tuple[Tensor, Tensor]
    share: Tensor


def _node(log_weight: Tensor, u: Tensor) -> _Node:
    """Of the first quotient."""
    growth, inverse = log_phi(u), 2.0 / u
    log_psi_u = growth + 2.0 * u.log() - LOG2
    low, high = _log_phi_slope(u)
    whole = _log_one_plus(log_weight + log_psi_u)
    return _Node(
        u=u, log_value=log_weight + growth - whole, rate=(low + inverse, high + inverse),
        share=(log_weight + log_psi_u - whole).exp(),
    )  # fmt: skip


def _supremum(log_weight: Tensor, limit: Tensor, level: Level, value: Value, peak: Peak) -> Float[Tensor, "m"]:
    """Logarithm of a quotient's supremum over (0, limit]: its value at the limit, or a bound of the peak before it.

    Args:
        log_weight: ``log w``.
        limit: The interval's end.
        level: Increasing in u, <= 0 exactly where the quotient rises; and roughly its slope.
        value: Logarithm of the quotient.
        peak: Its bound between two places.
    """
    found = value(log_weight, limit)
    past = (level(log_weight, limit)[0] > 0.0).nonzero().flatten()
    if past.numel():
        weight, end = log_weight[past], limit[past]
        found[past] = peak(weight, *_enclosed_peak(weight, end, level))
    return found


def _enclosed_peak(log_weight: Tensor, limit: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Places a <= b in (0, limit] between which the quotient is largest; it falls at the limit."""
    a, b = torch.full_like(limit, SMALLEST_UNIT), limit
    root = torch.minimum(torch.nn.functional.softplus(-log_weight - LOG3), limit)  # near it for small and large w
    for side in (*NEWTON_STEPS * (0.0,), 1.0, -2.0):  # the last two lie on both sides of the root that was found
        u = torch.maximum(torch.minimum(root * (1.0 + side * BRACKET), b), a)
        height, slope = level(log_weight, u)
        rising = height <= 0.0
        a, b = torch.where(rising, torch.maximum(a, u), a), torch.where(rising, b, torch.minimum(b, u))
        root = torch.maximum(torch.minimum(u - height / slope, b), a)
    return a, b


def _curve_level(log_weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``2 w psi/(u^2 (1 + w psi))`` rises while ``w psi < u kappa / 2`` (F1 of lemma 3)."""
    kappa = _log_phi_slope(u)[0]
    return log_weight + log_psi(u) - (0.5 * u * kappa).log(), kappa + 1.0 / u - _log_phi_bend(u, kappa) / kappa


def _ramp_level(log_weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``w (psi/u)(1 - w u)/(1 + w psi)`` rises while ``w (psi^2 + u^2 psi') < u psi' - psi`` (F2 of lemma 3)."""
    kappa, log_psi_u = _log_phi_slope(u)[0], log_psi(u)
    rate, bend = kappa + 2.0 / u, _log_phi_bend(u, kappa)
    second = 2.0 * u.log() + rate.log() - log_psi_u  # log(u^2 psi' / psi^2)
    part, turn = torch.sigmoid(second), 2.0 / u - 1.0 / torch.expm1(-u) - rate
    slope = (1.0 - part) * rate + part * turn - (kappa + u * bend) / (1.0 + u * kappa)
    return log_weight + log_psi_u + _log_one_plus(second) - torch.log1p(u * kappa), slope.clamp_min(LEAST_SLOPE)


def _log_phi_bend(u: Tensor, kappa: Tensor) -> Tensor:
    """About ``kappa'(u)``; only for the slope of a Newton step."""
    rate = kappa + 2.0 / u
    return (2.0 / u.square() - rate * (rate + 1.0 / torch.expm1(-u))).clamp(0.0, 0.06)


def _curve_value(log_weight: Tensor, u: Tensor) -> Tensor:
    growth = log_phi(u)
    return log_weight + growth - _log_one_plus(log_weight + growth + 2.0 * u.log() - LOG2)


def _curve_peak(log_weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    a, b = _node(log_weight, left), _node(log_weight, right)
    steepest = b.rate[1] - 2.0 / b.u - b.rate[0] * a.share
    flattest = a.rate[0] - 2.0 / a.u - a.rate[1] * b.share
    return _tent(a.log_value, b.log_value, steepest, flattest, b.u - a.u)


def _saturating(log_weight: Float[Tensor, "m"], limit: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    top = _supremum(log_weight, limit, _curve_level, _curve_value, _curve_peak)
    return outward(torch.maximum(top, log_weight).exp(), ENTRY)


def _ramp_value(log_weight: Tensor, u: Tensor) -> Tensor:
    return _curve_value(log_weight, u) + u.log() - LOG2 + nonzero((1.0 - log_weight.exp() * u).clamp_min(0.0)).log()


def _ramp_peak(log_weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    a, b, weight = _node(log_weight, left), _node(log_weight, right), log_weight.exp()
    cuts = [(1.0 - weight * node.u).clamp_min(0.0) for node in (a, b)]
    low, high = (n.log_value + n.u.log() - LOG2 + nonzero(c).log() for n, c in zip((a, b), cuts, strict=True))
    tilts = [weight / nonzero(cut, SMALLEST_CUT) for cut in cuts]
    steepest = b.rate[1] - 2.0 / b.u + 1.0 / a.u - b.rate[0] * a.share - tilts[0]
    flattest = a.rate[0] - 2.0 / a.u + 1.0 / b.u - a.rate[1] * b.share - tilts[1]
    tent = _tent(low, high, steepest, flattest, b.u - a.u)
    # Where the factor 1 - w u vanishes before b its slope is not bounded: the rise alone is.
    return torch.where(cuts[1] > SMALLEST_CUT, tent, low + steepest.clamp_min(0.0) * (b.u - a.u))


def _pair_slope(log_weight: Float[Tensor, "m"], limit: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    return outward(_supremum(log_weight, limit, _ramp_level, _ramp_value, _ramp_peak).exp(), ENTRY)


def _tent(left: Tensor, right: Tensor, steepest: Tensor, flattest: Tensor, width: Tensor) -> Tensor:
    """Bound of a function on a cell from its end values and bounds ``flattest <= slope <= steepest``."""
    rise, fall = steepest.clamp_min(0.0), (-flattest).clamp_min(0.0)
    peak = (rise * right + fall * left + rise * fall * width) / nonzero(rise + fall)
    return torch.where((rise > 0) & (fall > 0), peak, torch.maximum(left, right))


def _log_one_plus(log_value: Tensor) -> Tensor:
    """``log(1 + e^x)``; beyond the threshold the rest is below one unit in the last place."""
    return torch.nn.functional.softplus(log_value, threshold=40.0)
