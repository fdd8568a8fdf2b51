"""The exponential remainder ``psi(u) = e^u - 1 - u`` and ``phi(u) = 2 psi(u) / u^2``, near 0 and in log space.

phi increases from 0 through phi(0) = 1. Weights enter by their logarithm: at saturated rows a weight w is far below the
smallest float while ``w psi(U)`` is not, so everything stays a logarithm until the end and nothing is clamped.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.rounding import ENTRY, outward

NEAR = 1e-2  # below, psi comes from its series: the difference would cancel
FAR = 40.0  # above, log psi(u) = u + log(1 - (1 + u) e^-u) needs no cancellation
LARGEST_LOG = 600.0  # exponentials beyond are reported as infinite
MULTIPLIER_STEPS = 20  # bisections of a multiplier; every value gives a bound
LOG2 = math.log(2.0)


def psi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``e^u - 1 - u``, accurate near 0; infinite where e^u is."""
    return torch.where(u.abs() < NEAR, 0.5 * u * u * _series(u), torch.expm1(u) - u)


def _series(u: Tensor) -> Tensor:
    """Phi near 0."""
    return 1.0 + u / 3.0 * (1.0 + u / 4.0 * (1.0 + u / 5.0 * (1.0 + u / 6.0 * (1.0 + u / 7.0 * (1.0 + u / 8.0)))))


def log_psi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log psi(u)`` for u >= 0 (-inf at 0), without overflow and without cancellation."""
    return 2.0 * u.log() - LOG2 + log_phi(u)


def log_phi(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log phi(u)`` for u >= 0; 0 at 0, increasing."""
    middle = u.clamp(NEAR, FAR)
    direct = (2.0 * (torch.expm1(middle) - middle) / middle.square()).log()
    value = torch.where(u < NEAR, _series(u.clamp_max(NEAR)).log(), direct)
    if not bool((u > FAR).any()):  # the usual case, at half the cost
        return value
    far = u.clamp_min(FAR)
    return torch.where(u > FAR, far + torch.log1p(-(1.0 + far) * torch.exp(-far)) + LOG2 - 2.0 * far.log(), value)


def phi_negative(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``phi(-u) = 2 psi(-u) / u^2`` for u >= 0: in (0, 1], decreasing in u."""
    far = u.clamp_min(NEAR)
    return torch.where(u < NEAR, _series(-u.clamp_max(NEAR)), 2.0 * (torch.expm1(-far) + far) / far.square())


def psi_slope_negative(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``psi(-u) / u`` for u >= 0: in [0, 1), increasing in u."""
    return 0.5 * u * phi_negative(u)


def weighted_phi(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``w phi(limit)``; infinite where it exceeds e^600."""
    log_value = log_weight + log_phi(limit)  # -inf for hidden tokens, whose exponential is 0
    value = outward(log_value.clamp_max(LARGEST_LOG).exp(), ENTRY)
    return torch.where(log_value > LARGEST_LOG, torch.inf, value)


def largest_remainder(weight: Float[Tensor, "*b n"], limit: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Upper bound of ``E psi(u)`` over all u with ``|u_j| <= limit_j`` and ``E u = 0``.

    ``E psi(u) = E[psi(u) - l u] <= sum_j w_j max(psi(U_j) - l U_j, psi(-U_j) + l U_j)`` for every l; bisection on the
    slope of the right side, convex in l, chooses one.

    Args:
        weight: w, sum 1.
        limit: U; beyond 700 the bound is infinite.

    References:
        Derived; docs/margin-certificate.md, lemma 4.
    """
    high_end, low_end = psi(limit), psi(-limit)
    low = torch.zeros_like(limit[..., :1])
    high = ((high_end - low_end) / (2.0 * limit.clamp_min(NEAR))).amax(-1, keepdim=True)
    for _ in range(MULTIPLIER_STEPS):
        middle = 0.5 * (low + high)
        first = high_end - middle * limit > low_end + middle * limit
        falling = (weight * limit * torch.where(first, -1.0, 1.0)).sum(-1, keepdim=True) < 0.0
        low, high = torch.where(falling, middle, low), torch.where(falling, high, middle)
    value = (weight * torch.maximum(high_end - high * limit, low_end + high * limit)).sum(-1)
    # The differences cancel; the sum of the absolute terms times a few roundings covers it.
    size = (weight * (high_end + low_end + 2.0 * high * limit)).sum(-1)
    value = value + 1e-14 * size
    return torch.where(torch.isfinite(value), value, torch.inf)
