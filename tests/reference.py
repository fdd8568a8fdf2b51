"""Slow attention in plain numpy, one loop per index, written from the formula alone; imports nothing of the package.

Every function takes complex tokens too, which gives derivatives to machine precision (``jacobian``).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def softmax(scores: Array) -> Array:
    """``exp(s_j) / sum exp(s)`` of one row; -inf gives exactly 0."""
    seen = [j for j in range(len(scores)) if not (np.isneginf(scores[j].real))]
    shift = max(scores[j].real for j in seen)
    out = np.zeros(len(scores), dtype=np.result_type(scores, float))
    for j in seen:
        out[j] = np.exp(scores[j] - shift)
    return out / out.sum()


def attention_weights(
    x: Array,
    w_q: Array,
    w_k: Array,
    *,
    b_q: Array | None = None,
    b_k: Array | None = None,
    scale: float | None = None,
    mask: Array | None = None,
    causal: bool = False,
    mass: Array | None = None,
) -> Array:
    """Weights (h, n, n): softmax over j of ``scale <q_i, k_j> + mask_ij + log mass_j``, j <= i only if causal."""
    heads, _, width = w_q.shape
    n = x.shape[0]
    factor = 1 / math.sqrt(width) if scale is None else scale
    out = np.zeros((heads, n, n), dtype=np.result_type(x, float))
    for h in range(heads):
        for i in range(n):
            query = x[i] @ w_q[h] + (0 if b_q is None else b_q[h])
            scores = np.empty(n, dtype=out.dtype)
            for j in range(n):
                key = x[j] @ w_k[h] + (0 if b_k is None else b_k[h])
                scores[j] = factor * (query @ key)
                if mask is not None:
                    scores[j] = scores[j] + mask[i, j] if np.isfinite(mask[i, j]) else -np.inf
                if mass is not None:
                    scores[j] += math.log(mass[j])
                if causal and j > i:
                    scores[j] = -np.inf
            out[h, i] = softmax(scores)
    return out


def attention(
    x: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    *,
    b_v: Array | None = None,
    w_o: Array | None = None,
    b_o: Array | None = None,
    **scores: Any,
) -> Array:
    """Output (n, e): heads summed through ``w_o`` (h, v, e), or side by side without it."""
    weights = attention_weights(x, w_q, w_k, **scores)
    heads, n, _ = weights.shape
    rows = []
    for i in range(n):
        parts = []
        for h in range(heads):
            average = 0
            for j in range(n):
                value = x[j] @ w_v[h] + (0 if b_v is None else b_v[h])
                average = average + weights[h, i, j] * value
            parts.append(average)
        row = np.concatenate(parts) if w_o is None else sum(parts[h] @ w_o[h] for h in range(heads))
        rows.append(row if b_o is None else row + b_o)
    return np.stack(rows)


def arguments(layer: Any) -> dict[str, Any]:
    """The arguments of ``attention`` read off any object that has fields of these names."""
    names = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "w_o", "b_o", "mask")
    found = {name: None if getattr(layer, name) is None else np.asarray(getattr(layer, name)) for name in names}
    return found | {"scale": layer.scale, "causal": layer.causal}


def jacobian(function: Callable[[Array], Array], x: Array) -> Array:
    """``J[i, a, j, b] = d f_ia / d x_jb`` by complex steps: exact to rounding, for analytic functions only."""
    step = 1e-30
    columns = []
    for j in range(x.shape[0]):
        for b in range(x.shape[1]):
            moved = x.astype(complex)
            moved[j, b] += 1j * step
            columns.append(function(moved).imag / step)
    stacked = np.stack(columns, axis=-1)
    return stacked.reshape(*stacked.shape[:-1], *x.shape)
