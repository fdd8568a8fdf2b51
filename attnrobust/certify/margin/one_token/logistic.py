"""One softmax weight as a function of its own logit: bounds of the second-order remainder of the logistic function."""

import torch
from jaxtyping import Float
from torch import Tensor

NODES = 40
FOURTH = 0.13  # |sigma''''| <= 0.13 everywhere; |g''| <= FOURTH / 6 (docs/margin-certificate.md, lemma 11)
SECOND = 0.0963  # sup |sigma''| = 1 / (6 sqrt 3) = 0.09623
NEAR = 1e-2  # below, g comes from two terms of its series
PAD = 1e-10  # absolute rounding of g: differences of numbers <= 1 divided by NEAR^2


def remainder_range(
    logit: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """Bounds of ``g(a) = 2 (sigma(x + a) - sigma(x) - sigma'(x) a) / a^2`` over 0 < |a| <= limit.

    g is evaluated at nodes; between two of them it leaves the interval of their values by at most
    ``h^2 / 8 sup |g''|``, and ``g(a) = int_0^1 2 (1 - s) sigma''(x + s a) ds`` gives ``|g''| <= sup |sigma''''| / 6``.

    Args:
        logit: x; -inf (hidden) gives zeros, +inf too.
        limit: Largest |a|.

    Returns:
        (upper bound, lower bound).

    References:
        Derived; docs/margin-certificate.md, lemma 11.
    """
    shift = limit[..., None] * torch.linspace(-1.0, 1.0, 2 * NODES + 1, dtype=limit.dtype, device=limit.device)
    x = logit.clamp(-1e6, 1e6)[..., None]
    p = torch.sigmoid(x)
    slope = p * torch.sigmoid(-x)
    safe = torch.where(shift.abs() < NEAR, NEAR, shift)
    change = torch.where(
        x > 0, torch.sigmoid(-x) - torch.sigmoid(-x - safe), torch.sigmoid(x + safe) - p
    )  # 1 - sigma(x) = sigma(-x) keeps the digits where sigma is near 1
    far = 2.0 * (change - slope * safe) / safe**2
    second = slope * (1.0 - 2.0 * p)
    third = slope * (1.0 - 6.0 * slope)
    g = torch.where(shift.abs() < NEAR, second + shift * third / 3.0, far)
    pad = (limit / NODES) ** 2 / 8.0 * FOURTH / 6.0 + NEAR**2 * FOURTH / 12.0 + PAD
    return g.amax(-1) + pad, g.amin(-1) - pad


def logistic_change(logit: Float[Tensor, "*#s"], shift: Float[Tensor, "*#s"]) -> Float[Tensor, "..."]:
    """``sigma(x + a) - sigma(x) = sigma(x + a) sigma(-x) (1 - e^-a)``, which does not cancel; mirrored for a < 0."""
    rise = torch.sigmoid(logit + shift) * torch.sigmoid(-logit) * -torch.expm1(-shift.clamp_min(0.0))
    fall = torch.sigmoid(logit) * torch.sigmoid(-logit - shift) * torch.expm1(shift.clamp_max(0.0))
    return torch.where(shift > 0, rise, fall)


def steepest_turn(logit: Float[Tensor, "*s"], limit: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``|sigma''|`` over ``[x - limit, x + limit]``.

    ``|sigma''| = sigma' |1 - 2 sigma|`` is at most sigma', which falls away from 0, and at most 1 / (6 sqrt 3).
    """
    nearest = (logit.abs() - limit).clamp_min(0.0)
    return (torch.sigmoid(nearest) * torch.sigmoid(-nearest)).clamp_max(SECOND)
