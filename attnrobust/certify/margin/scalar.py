"""Scalar bounds of the margin certificate: the exponential remainder and its suprema over an interval, in log space.

All formulas are for ``psi(u) = e^u - 1 - u`` and ``phi(u) = 2 psi(u) / u^2`` (increasing, phi(0) = 1). Weights enter by
their logarithm: at saturated rows w is far below the smallest float while w psi(U) is not, so nothing may be clamped.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CELLS = 24  # cells per interval; the suprema are then about 1 % too large
CHUNK_NUMBERS = 500_000  # float64 numbers per temporary: a block stays in the cache
SERIES = 1e-3  # below, psi comes from its series: the difference would cancel
SWITCH = 30.0  # above, e^-u (1 + u) is below one unit in the last place times 100 and log psi needs no cancellation
LARGEST_LOG = 600.0  # exponentials beyond are reported as infinite
MULTIPLIER_STEPS = 20  # bisections of a multiplier; every value gives a bound
LOG2 = 0.6931471805599453
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
    return torch.where(u < SERIES, u / 3.0 + u * u / 18.0, log_psi(safe) + LOG2 - 2.0 * safe.log())


def _log_phi_slope(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Upper bound of ``kappa(u) = (log phi)'(u) = psi'/psi - 2/u``, which increases from 1/3 to 1."""
    safe = u.clamp_min(0.05)
    ratio = torch.where(safe > SWITCH, 1.0, torch.expm1(safe.clamp_max(SWITCH)) / psi(safe.clamp_max(SWITCH)))
    return torch.where(u < 0.05, 1.0 / 3.0 + 0.25 * u, ratio - 2.0 / safe + 1e-12).clamp_max(1.0)


def _tent(left: Tensor, right: Tensor, steepest: Tensor, flattest: Tensor, width: Tensor) -> Tensor:
    """Bound of a function on a cell from its end values and bounds ``flattest <= slope <= steepest``."""
    rise = steepest.clamp_min(0.0)
    fall = (-flattest).clamp_min(0.0)
    peak = (rise * right + fall * left + rise * fall * width) / (rise + fall).clamp_min(1e-300)
    return torch.where((rise > 0) & (fall > 0), peak, torch.maximum(left, right))


def saturating_coefficient(
    log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """Upper bounds of two suprema over 0 < u <= limit.

    * ``f = sup 2 w psi / (u^2 (1 + w psi))``: then ``w psi(u) / (1 + w psi(u)) <= f u^2 / 2`` for |u| <= limit;
    * ``k = sup w (psi / u) (1 - w u)_+ / (1 + w psi)``.

    On a cell [a, b]: phi, psi/u and ``s = w psi / (1 + w psi)`` increase, so the quotients are at most
    ``min(w phi(b) / (1 + w psi(a)), 2 s(b) / a^2)`` and ``min(w psi(b) / (b (1 + w psi(a))), s(b) / a) (1 - w a)_+``.
    Sharper, to second order in the cell: the slope of the quotient's logarithm is known up to
    ``kappa(a) <= kappa <= kappa(b)`` and ``w psi'(a) / (1 + w psi(b)) <= m <= w psi'(b) / (1 + w psi(a))``.

    Args:
        log_weight: ``log w``; -inf (hidden token) gives zeros.
        limit: Largest |u|, >= 0.

    Returns:
        (f, k).

    References:
        Derived; docs/margin-certificate.md, lemma 3.
    """
    size = max(1, CHUNK_NUMBERS // CELLS)
    parts = [
        _suprema(log_w, u)
        for log_w, u in zip(log_weight.flatten().split(size), limit.flatten().split(size), strict=True)
    ]
    return torch.cat([f for f, _ in parts]).reshape(limit.shape), torch.cat([k for _, k in parts]).reshape(limit.shape)


def _suprema(log_weight: Float[Tensor, "s"], limit: Float[Tensor, "s"]) -> tuple[Tensor, Tensor]:
    hidden = torch.isneginf(log_weight)
    steps = torch.arange(CELLS + 1, dtype=limit.dtype, device=limit.device) / CELLS
    nodes = limit.clamp_min(1e-100)[:, None] * steps**1.5  # dense near 0
    log_w = log_weight.masked_fill(hidden, 0.0)[:, None]
    log_node = nodes.log()  # -inf at 0
    share = log_w + log_psi(nodes)  # log(w psi)
    whole = torch.nn.functional.softplus(share)  # log(1 + w psi)
    growth = torch.where(nodes < SERIES, log_w + log_phi(nodes), share + LOG2 - 2.0 * log_node)  # log(w phi)
    log_left, log_right = log_node[:, :-1], log_node[:, 1:]
    log_share = (share - whole)[:, 1:]
    curve = torch.minimum(growth[:, 1:] - whole[:, :-1], log_share + LOG2 - 2.0 * log_left)
    ramp = torch.minimum(growth[:, 1:] + log_right - LOG2 - whole[:, :-1], log_share - log_left)
    # Slopes of log(w phi / (1 + w psi)); the bound above stays where the cell is too wide for them.
    kappa = _log_phi_slope(nodes)
    log_rise = log_w + nodes + torch.log(-torch.expm1(-nodes))  # log(w psi')
    least = (log_rise[:, :-1] - whole[:, 1:]).exp()
    most = (log_rise[:, 1:] - whole[:, :-1]).clamp_max(50.0).exp()
    steepest, flattest = kappa[:, 1:] - least, (kappa[:, :-1] - 0.25 * nodes[:, :-1].clamp_max(0.05)) - most
    flattest = torch.maximum(flattest, 1.0 / 3.0 - most)
    width = nodes[:, 1:] - nodes[:, :-1]
    value = growth - whole
    tent = _tent(value[:, :-1], value[:, 1:], steepest, flattest, width)
    usable = most < 1e20
    curve = torch.where(usable, torch.minimum(curve, tent), curve)
    weight = log_w.exp()
    cut = (1.0 - weight * nodes).clamp_min(0.0)
    tilt_most, tilt_least = weight / cut[:, 1:].clamp_min(1e-12), weight / cut[:, :-1].clamp_min(1e-12)
    value = value + log_node - LOG2 + cut.clamp_min(1e-300).log()
    inverse = 1.0 / nodes
    tent = _tent(
        value[:, 1:-1],
        value[:, 2:],
        (steepest + inverse[:, :-1])[:, 1:] - tilt_least[:, 1:],
        (flattest + inverse[:, 1:])[:, 1:] - tilt_most[:, 1:],
        width[:, 1:],
    )
    usable = usable[:, 1:] & (cut[:, 2:] > 1e-3)
    ramp = ramp + cut[:, :-1].clamp_min(1e-300).log()
    ramp = torch.cat([ramp[:, :1], torch.where(usable, torch.minimum(ramp[:, 1:], tent), ramp[:, 1:])], dim=1)
    found = curve.exp().amax(-1) * OUTWARD, ramp.exp().amax(-1) * OUTWARD
    return found[0].masked_fill(hidden, 0.0), found[1].masked_fill(hidden, 0.0)


def weighted_phi(log_weight: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``w phi(limit)``; infinite where it exceeds e^600."""
    log_value = log_weight + log_phi(limit)  # -inf for hidden tokens, whose exponential is 0
    return torch.where(log_value > LARGEST_LOG, torch.inf, log_value.clamp_max(LARGEST_LOG).exp() * OUTWARD)


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
    high = ((high_end - low_end) / (2.0 * limit.clamp_min(SERIES))).amax(-1, keepdim=True)
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
