"""Slopes of the activation functions over intervals, and the remainder of their first-order expansion.

Every slope ``phi'`` is monotone between the zeros of ``phi''``, so its range over an interval is that of its values at
the ends and at the zeros inside. The zeros and the suprema of ``|phi''|`` and ``|phi'''|``:
docs/network-certificates.md, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.activation_functions import FUNCTIONS, QUICK
from attnrobust.numerics.rounding import ENTRY, outward

FAR = 100.0  # beyond, every slope is constant to more digits than float64 has
ROUNDING = 1e-14  # absolute, of slopes and second derivatives of size about 1

GELU_TANH_BEND = 1.4185040087908283
SILU_BEND = 2.399357280520547  # x tanh(x / 2) = 2
SILU_THIRD = 0.3085  # sup |phi'''| = 0.30837...


@dataclass(frozen=True)
class Shape:
    """What is known of one activation function.

    Args:
        bends: Every zero of phi''.
        second: At least ``sup |phi''|``.
        third: At least ``sup |phi'''|``.
    """

    bends: tuple[float, ...]
    second: float
    third: float


SHAPES: Mapping[str, Shape] = {
    "gelu": Shape((-(2.0**0.5), 2.0**0.5), second=0.7979, third=0.7788),
    "gelu_tanh": Shape((-GELU_TANH_BEND, GELU_TANH_BEND), second=0.7979, third=0.7768),
    "quick_gelu": Shape((-SILU_BEND / QUICK, SILU_BEND / QUICK), second=0.5 * QUICK, third=SILU_THIRD * QUICK**2),
    "silu": Shape((-SILU_BEND, SILU_BEND), second=0.5, third=SILU_THIRD),
    "tanh": Shape((0.0,), second=0.7699, third=2.0),
    "sigmoid": Shape((0.0,), second=0.09623, third=0.125),
    "identity": Shape((), second=0.0, third=0.0),
}


def slope_range(name: str, low: Float[Tensor, "*s"], high: Float[Tensor, "*s"]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest slope over ``[low, high]``, entry by entry."""
    if name == "relu":
        return (low > 0.0).to(low), (high >= 0.0).to(high)
    low, high = low.clamp(-FAR, FAR), high.clamp(-FAR, FAR)
    places = [low, high, *(torch.clamp(torch.full_like(low, bend), low, high) for bend in shape_of(name).bends)]
    slopes = torch.stack([FUNCTIONS[name].slope(place) for place in places])
    return slopes.amin(dim=0) - ROUNDING, slopes.amax(dim=0) + ROUNDING


def largest_slope(name: str, x: Float[Tensor, "*s"], reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``|phi(x + t) - phi(x)| / |t|`` over ``0 < |t| <= reach``: of ReLU exact, else ``sup |phi'|``."""
    if name == "relu":
        return _relu_slope(x, reach)
    low, high = slope_range(name, x - reach, x + reach)
    return outward(torch.maximum(low.abs(), high.abs()), ENTRY)


def remainder_slope(name: str, x: Float[Tensor, "*s"], reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``|phi(x + t) - phi(x) - phi'(x) t| / |t|`` over ``0 < |t| <= reach``.

    The smaller of the Taylor form ``reach min(sup|phi''| / 2, |phi''(x)| / 2 + reach sup|phi'''| / 6)`` and the largest
    difference of a slope in the interval to that at x. ReLU: ``(1 - |x| / reach)_+``, exactly.

    References:
        Derived; docs/network-certificates.md, section 3.
    """
    if name == "relu":
        return _relu_overshoot(x, reach)
    shape, higher = shape_of(name), FUNCTIONS[name].higher
    assert higher is not None  # noqa: S101 - only ReLU has none; narrows the type
    clean = higher(x.clamp(-FAR, FAR))[0].abs() + ROUNDING
    taylor = reach * torch.minimum(0.5 * clean + reach * (shape.third / 6.0), torch.full_like(x, 0.5 * shape.second))
    low, high = slope_range(name, x - reach, x + reach)
    own = FUNCTIONS[name].slope(x.clamp(-FAR, FAR))
    return outward(torch.minimum(taylor, torch.maximum(high - own, own - low)), ENTRY)


def _relu_slope(x: Tensor, reach: Tensor) -> Tensor:
    """``sup |relu(x + t) - relu(x)| / |t|``: 1 where x > 0; else ``(1 - |x| / reach)_+``."""
    return torch.where(x > 0.0, torch.ones_like(x), _relu_overshoot(x, reach))


def _relu_overshoot(x: Tensor, reach: Tensor) -> Tensor:
    share = 1.0 - x.abs() / reach  # NaN where both are 0, and where the reach is infinite too
    share = torch.where(torch.isfinite(reach) & (reach > 0.0), share, torch.ones_like(share))
    return outward(share.clamp_min(0.0) + ROUNDING, ENTRY)


def shape_of(name: str) -> Shape:
    """What is known of a function.

    Raises:
        UnsupportedModelError: A function whose bends nobody has listed.
    """
    if name not in SHAPES:
        raise UnsupportedModelError(f"the slopes of {name} are not bounded over intervals")
    return SHAPES[name]
