"""The one place of outward rounding: shares by name, functions that move a number to its safe side, safe quotients.

A *share* is relative: a number x moves by ``share * |x|``. Factors such as ``1 + share`` have no name anywhere and are
refused here, so that the one cannot be taken for the other. The shares cover the rounding of float64 formulas of the
stated kind; they are no proof of outward rounding (kind ``rigorous`` is).
"""

import math
from collections.abc import Iterable
from typing import Final, NewType, TypeVar

import numpy as np
import torch
from torch import Tensor

Share = NewType("Share", float)
Number = TypeVar("Number", float, Tensor, np.ndarray)

NONE: Final = Share(0.0)
"""Nothing: the number carries its rounding already."""
UNIT: Final = Share(1e-15)
"""One correctly rounded operation, with room for a few units in the last place."""
ENTRY: Final = Share(1e-12)
"""Formulas of up to a few hundred operations per entry, without cancellation."""
FORMULA: Final = Share(1e-10)
"""Norms, eigenvalues and sums of positive terms over matrices of up to a few thousand rows."""
PROOF: Final = Share(1e-9)
"""Products, factorisations and solutions behind the value of a whole trust region."""
CANCELLATION: Final = Share(1e-13)
"""Of the size of terms that cancel: sums of up to 1e4 of them stay inside."""
LARGEST_SHARE: Final = 1e-3

SMALLEST: Final = 1e-300
"""Below every meaningful number: a divisor of at least this makes 0/0 zero in a normalisation (never in a bound)."""
SMALLEST_UNIT: Final = 1e-100
"""Smallest unit of a parameter: its square and the inverse of its square are still numbers."""


def outward(value: Number, share: Share = FORMULA) -> Number:
    """An upper bound moved up: ``x + share |x|``.

    Args:
        value: Computed upper bound, any sign.
        share: Relative amount; a factor like 1 + 1e-10 is refused.

    Returns:
        An upper bound.

    Raises:
        ValueError: A share that is not in [0, 1e-3].
    """
    moved: Number = value + checked(share) * abs(value)
    return moved


def inward(value: Number, share: Share = FORMULA) -> Number:
    """A finite lower bound moved down: ``x - share |x|``; see ``outward``."""
    moved: Number = value - checked(share) * abs(value)
    return moved


def checked(share: Share) -> Share:
    """The share itself.

    Raises:
        ValueError: A share that is not in [0, 1e-3].
    """
    if not 0.0 <= share <= LARGEST_SHARE:
        raise ValueError(f"a rounding share is relative and small; got {share!r}, did you mean a share, not a factor?")
    return share


def round_up(value: float, *, relative: float = ENTRY) -> float:
    """Move a non-negative float64 result outward (up) by a share, and by at least one unit in the last place.

    Args:
        value: Computed value, >= 0.
        relative: The share, default 1e-12 (about 4500 units in the last place).

    Returns:
        A float >= value.
    """
    return math.nextafter(value * (1.0 + relative), math.inf)


def round_down(value: float, *, relative: float = ENTRY) -> float:
    """Move a non-negative float64 result inward (down) by a share, never below 0."""
    return max(0.0, math.nextafter(value * (1.0 - relative), 0.0)) if value > 0 else 0.0


def nonzero(value: Tensor, floor: float = SMALLEST) -> Tensor:
    """A non-negative divisor kept away from 0; only for numbers of which no bound depends on the clamp's side."""
    return value.clamp_min(floor)


def nan_is_infinite(bound: Tensor) -> Tensor:
    """Upper bounds in which NaN, which would lose every comparison, says nothing: infinity."""
    return bound.masked_fill(torch.isnan(bound), torch.inf)


def worst(bounds: Iterable[float]) -> float:
    """The largest of upper bounds of a quantity >= 0; a NaN among them counts as infinity (``max`` would drop it)."""
    return max((math.inf if math.isnan(bound) else bound for bound in bounds), default=0.0)


def used_share(
    change: float | Tensor | Iterable[float], budget: float | Tensor | Iterable[float], *, share: Share = NONE
) -> float:
    """Upper bound of the used share of a budget, ``max_k change_k / budget_k``: the one quotient behind every usage.

    What says nothing is infinite, never small: a change that is NaN or infinite, and a budget that is not a positive
    finite number (0/0 and x/inf alike).

    Args:
        change: Upper bounds of the changes; negative ones use nothing.
        budget: What each change may be.
        share: Covers the rounding of the changes.

    Returns:
        An upper bound >= 0, rounded outward.
    """
    pairs = zip(_numbers(change), _numbers(budget), strict=True)
    used = worst(_quotient(one, limit) for one, limit in pairs)
    return round_up(used, relative=checked(share)) if share and used > 0.0 else used


def _quotient(change: float, budget: float) -> float:
    if not (0.0 < budget < math.inf) or math.isnan(change):
        return math.inf
    return max(change / budget, 0.0)


def _numbers(values: float | Tensor | Iterable[float]) -> list[float]:
    if isinstance(values, Tensor):
        return [float(value) for value in values.flatten().tolist()]
    return [float(values)] if isinstance(values, int | float) else [float(value) for value in values]
