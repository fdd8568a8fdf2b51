"""Suprema of derivatives of activation functions: over the real line, and from there over any interval.

The third and fourth derivatives are bounded by constants M3, M4 over the whole line, so on ``|y - x| <= E``
``|f''(y)| <= min(M2, |f''(x)| + M3 E)`` and ``|f'''(y)| <= min(M3, |f'''(x)| + M4 E)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.layers.graph.activation_functions import QUICK
from attnrobust.numerics.rounding import ENTRY, UNIT, outward

CELLS = 16  # of an interval on which a derivative is enclosed


@dataclass(frozen=True)
class Suprema:
    """Upper bounds of ``|f''|``, ``|f'''|``, ``|f''''|`` over the real line.

    Args:
        second: M2.
        third: M3.
        fourth: M4.
    """

    second: float
    third: float
    fourth: float

    def scaled(self, factor: float) -> "Suprema":
        """Of ``f(factor x) / factor``."""
        return Suprema(self.second * factor, self.third * factor**2, self.fourth * factor**3)


_SILU = Suprema(0.501, 0.311, 0.501)

SUPREMA: Mapping[str, Suprema] = {
    "gelu": Suprema(0.799, 0.783, 1.597),
    "gelu_tanh": Suprema(0.799, 0.783, 1.606),
    "silu": _SILU,
    "quick_gelu": _SILU.scaled(QUICK),
    "tanh": Suprema(0.771, 2.001, 4.088),
    "sigmoid": Suprema(0.0964, 0.1251, 0.1278),
    "identity": Suprema(0.0, 0.0, 0.0),
}
"""Rounded up from the largest values on a fine grid; a test repeats it with the error between its points."""


def oscillation(
    function: Callable[[Tensor], Tensor], steepness: float, x: Tensor, size: Tensor, *, cells: int = CELLS
) -> Tensor:
    """Upper bound of ``|g(y) - g(x)|`` over ``|y - x| <= size``, entry by entry, for g with ``|g'| <= steepness``.

    On a cell of length h g stays within ``h steepness / 2`` of the mean of its values at the two ends (lemma 9).
    """
    clean, largest = function(x), torch.zeros_like(x)
    before = function(x - size)
    for cell in range(1, cells + 1):
        after = function(x + (2.0 * cell / cells - 1.0) * size)
        largest = torch.maximum(largest, (0.5 * (before + after) - clean).abs())
        before = after
    return outward(largest + steepness * size / cells + 8.0 * UNIT * (1.0 + clean.abs()), ENTRY)
