"""Numbers that know on which side of the truth they are."""

import math
from dataclasses import dataclass

from attnrobust.errors import InputError


@dataclass(frozen=True, slots=True, order=False)
class Lower:
    """A number that is at most the true quantity (attack values, sampled norms).

    Args:
        value: The number; must not be NaN.
    """

    value: float

    def __post_init__(self) -> None:
        _refuse_nan(self.value)


@dataclass(frozen=True, slots=True, order=False)
class Upper:
    """A number that is at least the true quantity (Lipschitz bounds, remainders).

    Args:
        value: The number; infinity means "no bound"; must not be NaN.
        failure_probability: Probability with which the claim may fail (0 for a deterministic bound).
    """

    value: float
    failure_probability: float = 0.0

    def __post_init__(self) -> None:
        _refuse_nan(self.value)
        if not 0.0 <= self.failure_probability < 1.0:
            raise InputError(f"failure probability {self.failure_probability} is not in [0, 1)")


def _refuse_nan(value: float) -> None:
    if math.isnan(value):
        raise InputError("a bound is NaN; the computation behind it failed")


def round_up(value: float, *, relative: float = 1e-12) -> float:
    """Move a non-negative float64 result outward (up) by a relative amount.

    Covers the rounding of a backward-stable float64 computation of moderate size; it is not a proof of
    outward rounding (kind ``rigorous`` is).

    Args:
        value: Computed value, >= 0.
        relative: Relative amount, default 1e-12 (about 4500 units in the last place).

    Returns:
        A float >= value.
    """
    return math.nextafter(value * (1.0 + relative), math.inf)


def round_down(value: float, *, relative: float = 1e-12) -> float:
    """Move a non-negative float64 result inward (down) by a relative amount, never below 0."""
    return max(0.0, math.nextafter(value * (1.0 - relative), 0.0)) if value > 0 else 0.0
