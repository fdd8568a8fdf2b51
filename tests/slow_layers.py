"""The other attentions and the norms in plain numpy, one loop per index; imports nothing of the package.

Every function takes complex tokens too (squares instead of absolute values), for derivatives by complex steps.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference import softmax

Array = NDArray[Any]


def together(heads: list[Array], w_o: Array | None, b_o: Array | None) -> Array:
    """Heads (n, v) side by side, or summed through ``w_o``."""
    out = np.concatenate(heads, axis=1) if w_o is None else sum(f @ w for f, w in zip(heads, w_o, strict=True))
    return np.asarray(out if b_o is None else out + b_o)


def average(scores: Array, values: Array, mass: Array | None, *, causal: bool = False) -> Array:
    """Rows ``sum_j softmax_j(scores_ij + log mass_j) values_j``; over j <= i if ``causal``."""
    shifted = scores if mass is None else scores + np.log(mass)
    seen = [i + 1 if causal else len(values) for i in range(len(scores))]
    return np.stack([softmax(row[:m]) @ values[:m] for row, m in zip(shifted, seen, strict=True)])


def l2(
    x: Array,
    w_q: Array,
    w_v: Array,
    *,
    w_o: Array | None = None,
    b_o: Array | None = None,
    scale: float | None = None,
    mass: Array | None = None,
    metric: bool = True,
    causal: bool = False,
) -> Array:
    """``P X (scale w w^T) w_v`` with P_ij ~ mass_j exp(-scale |(x_i - x_j) w|^2); no w w^T if not ``metric``."""
    heads, n = [], x.shape[0]
    for w, value in zip(w_q, w_v, strict=True):
        factor = 1 / math.sqrt(w.shape[1]) if scale is None else scale
        scores = np.empty((n, n), dtype=x.dtype)
        for i in range(n):
            for j in range(n):
                difference = (x[i] - x[j]) @ w
                scores[i, j] = -factor * (difference @ difference)
        values = x @ (factor * w @ w.T if metric else np.eye(x.shape[1])) @ value
        heads.append(average(scores, values, mass, causal=causal))
    return together(heads, w_o, b_o)


def unit(y: Array, eps: float) -> Array:
    """Rows ``y / sqrt(|y|^2 + eps)``."""
    return np.stack([row / np.sqrt(row @ row + eps) for row in y])


def cosine(
    x: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    *,
    w_o: Array | None = None,
    b_o: Array | None = None,
    tau: float,
    nu: float,
    eps: float,
    mass: Array | None = None,
) -> Array:
    """``nu softmax(tau g(Q) g(K)^T) g(V)``."""
    heads = []
    for q, k, v in zip(w_q, w_k, w_v, strict=True):
        scores = tau * unit(x @ q, eps) @ unit(x @ k, eps).T
        heads.append(nu * average(scores, unit(x @ v, eps), mass))
    return together(heads, w_o, b_o)


def sigmoid(
    x: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    *,
    w_o: Array | None = None,
    b_o: Array | None = None,
    scale: float | None = None,
    shift: float = 0.0,
    mass: Array | None = None,
) -> Array:
    """``sum_j mass_j sigma(scale <q_i, k_j> + shift) v_j``."""
    n = x.shape[0]
    weight = np.full(n, 1 / n) if mass is None else mass
    heads = []
    for q, k, v in zip(w_q, w_k, w_v, strict=True):
        factor = 1 / math.sqrt(q.shape[1]) if scale is None else scale
        out = np.zeros((n, v.shape[1]), dtype=x.dtype)
        for i in range(n):
            for j in range(n):
                score = factor * ((x[i] @ q) @ (x[j] @ k)) + shift
                out[i] = out[i] + weight[j] / (1 + np.exp(-score)) * (x[j] @ v)
        heads.append(out)
    return together(heads, w_o, b_o)


def lipschitznorm(
    x: Array, w_q: Array, w_k: Array, w_v: Array, *, w_o: Array | None = None, b_o: Array | None = None
) -> Array:
    """``softmax(Q K^T / max(uv, uw, vw)) V`` with u = |Q|_F, v and w the longest key and value."""
    heads = []
    for q, k, v in zip(w_q, w_k, w_v, strict=True):
        queries, keys, values = x @ q, x @ k, x @ v
        u = np.sqrt(sum(row @ row for row in queries))
        longest = [max((np.sqrt(row @ row) for row in rows), key=lambda z: z.real) for rows in (keys, values)]
        divisor = max((u * longest[0], u * longest[1], longest[0] * longest[1]), key=lambda z: z.real)
        scores = queries @ keys.T / (divisor if divisor != 0 else 1)
        heads.append(average(scores, values, None))
    return together(heads, w_o, b_o)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """Token minus its mean, over the root of its variance plus eps."""
    rows = []
    for row in x:
        centred = row - row.sum() / len(row)
        rows.append(weight * centred / np.sqrt((centred @ centred) / len(row) + eps) + (0 if bias is None else bias))
    return np.stack(rows)


def rms_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """Token over the root of its mean square plus eps."""
    rows = [weight * row / np.sqrt((row @ row) / len(row) + eps) + (0 if bias is None else bias) for row in x]
    return np.stack(rows)
