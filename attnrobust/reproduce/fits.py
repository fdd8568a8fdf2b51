"""Exponents of power laws with their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True)
class PowerLaw:
    """``y = factor x^exponent``, fitted to logarithms by least squares.

    Args:
        exponent: The fit.
        low: Lower end of its confidence interval, for independent normal errors of the logarithms.
        high: Upper end.
        factor: The fit.
        spread: Standard error of a logarithm.
        x: The abscissas.
    """

    exponent: float
    low: float
    high: float
    factor: float
    spread: float
    x: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def at(self, x: float) -> tuple[float, float, float]:
        """The fitted line at x, with the ends of its confidence band."""
        logs = np.log(self.x)
        deviation = (math.log(x) - logs.mean()) ** 2 / max(float(((logs - logs.mean()) ** 2).sum()), 1e-300)
        half = _quantile(len(logs)) * self.spread * math.sqrt(1.0 / len(logs) + deviation)
        middle = self.factor * x**self.exponent
        return middle, middle * math.exp(-half), middle * math.exp(half)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit an exponent.

    Args:
        x: Positive numbers, at least three, two of them different.
        y: Positive numbers.

    Examples:
        >>> str(power_law([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]))
        '1.00 [1.00, 1.00]'
    """
    logs, values = np.log(np.asarray(x)), np.log(np.asarray(y))
    centred = logs - logs.mean()
    square = float((centred**2).sum())
    exponent = float((centred * values).sum()) / square
    offset = float(values.mean()) - exponent * float(logs.mean())
    rest = values - exponent * logs - offset
    spread = math.sqrt(float((rest**2).sum()) / (len(logs) - 2))
    half = _quantile(len(logs)) * spread / math.sqrt(square)
    return PowerLaw(exponent, exponent - half, exponent + half, math.exp(offset), spread, tuple(map(float, x)))


def _quantile(count: int) -> float:
    return float(stdtrit(count - 2, 0.5 + LEVEL / 2.0))
