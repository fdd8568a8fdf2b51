"""The closed forms of section 8 of docs/certificates-literature.md, written a second time."""

import math

import numpy as np

from attnrobust.layers.attention import Attention


def eigenvector_lower(layer: Attention, radius: float, *, n: int | None = None) -> float:
    """Lower bound for one head without query bias: on n tokens, or in W_2 on token measures (n None).

    ``||uM|| sqrt(n-1) P (1 + 2 g (1-P))`` and ``(||uM||/2) (1 + g) e^g``, ``g = gamma R^2``, real eigenvectors u.
    """
    values, vectors = np.linalg.eig(layer.bilinear[0].T.numpy())
    best = 0.0
    for value, vector in zip(values, vectors.T, strict=True):
        if abs(value.imag) > 1e-9 * np.abs(values).max():
            continue
        g = float(max(-value.real, value.real / 8.0)) * radius**2
        reach = float(np.linalg.norm(vector.real @ layer.value_output[0].numpy()))
        if n is None:
            best = max(best, 0.5 * reach * (1.0 + g) * math.exp(g))
        elif n > 1:
            share = 1.0 / (1.0 + (n - 1) * math.exp(-2.0 * g))
            best = max(best, reach * math.sqrt(n - 1) * share * (1.0 + 2.0 * g * (1.0 - share)))
    return best
