"""Scalar bounds of the margin certificate: the exponential remainder and its suprema over an interval, in log space.

All formulas are for ``psi(u) = e^u - 1 - u`` and ``phi(u) = 2 psi(u) / u^2`` (increasing, phi(0) = 1). Weights enter by
their logarithm: at saturated rows w is far below the smallest float while w psi(U) is not, so nothing may be clamped.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CELLS = 28  # cells per interval; halving them moves a certified radius by less than 1 %
SERIES = 1e-3  # below, psi comes from its series: the difference would cancel
SWITCH = 30.0  # above, e^-u (1 + u) is below one unit in the last place times 100 and log psi needs no cancellation
LARGEST_LOG = 600.0  # exponentials beyond are reported as infinite
OUTWARD = 1.0 + 1e-12  # covers the rounding of these formulas


def psi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``e^u - 1 - u``, accurate near 0 and for u <= 600."""
    series = u * u * (0.5 + u * (1.0 / 6.0 + u * (1.0 / 24.0 + u / 120.0)))
    return torch.where(u.abs() < SERIES, series, torch.expm1(u) - u)


def log_psi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log psi(u)`` for u >= 0 (-inf at 0); never overflows."""
    large = u + torch.log1p(-(1.0 + u) * torch.exp(-u.clamp_min(SWITCH)))
    return torch.where(u > SWITCH, large, psi(u.clamp_max(SWITCH)).log())


def phi_negative(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``phi(-u) = 2 psi(-u) / u^2`` for u >= 0: in (0, 1], decreasing in u."""
    safe = u.clamp_min(SERIES)
    return torch.where(u < SERIES, 1.0 - u / 3.0, 2.0 * psi(-safe) / safe**2)


def log_phi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log phi(u)`` for u >= 0."""
    safe = u.clamp_min(SERIES)
    return torch.where(u < SERIES, u / 3.0 + u * u / 18.0, log_psi(safe) + (2.0 / safe**2).log())


def _nodes(limit: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right ends of the cells of [0, limit], dense near 0."""
    steps = torch.arange(CELLS + 1, dtype=limit.dtype, device=limit.device) / CELLS
    nodes = limit[..., None] * steps**1.5
    return nodes[..., :-1], nodes[..., 1:]


def saturating_coefficient(
    log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """Upper bounds of two suprema over 0 < u <= limit.

    * ``f = sup 2 w psi / (u^2 (1 + w psi))``: then ``w psi(u) / (1 + w psi(u)) <= f u^2 / 2`` for |u| <= limit;
    * ``k = sup w (psi / u) (1 - w u)_+ / (1 + w psi)``.

    On a cell [a, b]: phi and psi/u increase and ``s = w psi / (1 + w psi)`` increases, so the first quotient is at most
    ``min(w phi(b) / (1 + w psi(a)), 2 s(b) / a^2)`` and the second ``min(w psi(b) / (b (1 + w psi(a))), s(b) / a)``
    times ``(1 - w a)_+``.

    Args:
        log_weight: ``log w``; -inf (hidden token) gives zeros.
        limit: Largest |u|, >= 0.

    Returns:
        (f, k).

    References:
        Derived; docs/margin-certificate.md, lemmas 3 and 5.
    """
    hidden = torch.isneginf(log_weight)
    left, right = _nodes(limit.clamp_min(1e-100))
    log_w = log_weight.masked_fill(hidden, 0.0)[..., None]
    reached = torch.nn.functional.softplus(log_w + log_psi(left))
    share = log_w + log_psi(right)
    log_share = share - torch.nn.functional.softplus(share)
    log_left = left.log()  # -inf in the first cell: the second bound is void there
    first = torch.minimum(log_w + log_phi(right) - reached, log_share + 0.6931471805599453 - 2.0 * log_left)
    slope = torch.minimum(log_w + log_phi(right) + (0.5 * right).log() - reached, log_share - log_left)
    cut = (1.0 - log_w.exp() * left).clamp_min(0.0)
    curve, ramp = first.exp().amax(-1) * OUTWARD, (slope.exp() * cut).amax(-1) * OUTWARD
    return curve.masked_fill(hidden, 0.0), ramp.masked_fill(hidden, 0.0)


def weighted_phi(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``w phi(limit)``; infinite where it exceeds e^600."""
    log_value = log_weight + log_phi(limit)  # -inf for hidden tokens, whose exponential is 0
    return torch.where(log_value > LARGEST_LOG, torch.inf, log_value.clamp_max(LARGEST_LOG).exp() * OUTWARD)
