"""Numbers that know on which side of the truth they are."""

import math
from dataclasses import dataclass

from attnrobust.errors import InputError
from attnrobust.numerics.rounding import round_down, round_up

__all__ = ["Lower", "Upper", "round_down", "round_up"]


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
