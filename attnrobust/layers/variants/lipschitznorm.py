"""LipschitzNorm attention: scores divided by norms of the queries, keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.heads import HEAD_FEATURES, HeadSpecification, combine, project, softmax_average


def lipschitznorm_attention(
    x: Float[Tensor, "*b n d"],
    mass: Float[Tensor, "*m n"] | None,
    *,
    w_q: Float[Tensor, "h d k"],
    w_k: Float[Tensor, "h d k"],
    w_v: Float[Tensor, "h d v"],
    w_o: Float[Tensor, "h v e"] | None,
    b_o: Float[Tensor, "e"] | None,
) -> Float[Tensor, "*b n e"]:
    """The formula of ``LipschitzNormAttention`` in the precision of its arguments, differentiable almost everywhere."""
    if mass is not None:
        raise UnsupportedModelError(
            "LipschitzNorm attention divides by a norm that counts tokens; unequal token masses have no meaning for it"
        )
    queries, keys, values = (project(x, weight) for weight in (w_q, w_k, w_v))
    u = torch.linalg.vector_norm(queries, dim=(-2, -1))
    v = torch.linalg.vector_norm(keys, dim=-1).amax(dim=-1)
    w = torch.linalg.vector_norm(values, dim=-1).amax(dim=-1)
    largest = torch.maximum(torch.maximum(u * v, u * w), v * w)
    divisor = torch.where(largest > 0, largest, torch.ones_like(largest))[..., None, None]
    return combine(softmax_average(queries @ keys.transpose(-1, -2) / divisor, values, None), w_o, b_o)


@dataclass(frozen=True, eq=False)
class LipschitzNormAttention(HeadSpecification):
    """Attention with normalised scores: ``f(X)_i = sum_h (sum_j P^h_ij x_j w_v^h) w_o^h + b_o``.

    ``P = softmax(Q K^T / max(u v, u w, v w))`` with ``Q = X w_q``, ``K = X w_k``, ``V = X w_v`` and, per head,
    ``u = ||Q||_F``, ``v = max_j |k_j|_2``, ``w = max_j |v_j|_2``. Where the maximum is 0, Q or K is, and so are
    the scores. The layer is positively homogeneous: ``f(c X) - b_o = c (f(X) - b_o)`` for c > 0.

    ``u`` counts tokens, so the layer is not a function of a token measure, and unequal masses are refused.

    Args:
        w_q: Query weights (h, d, k).
        w_k: Key weights (h, d, k).
        w_v: Value weights (h, d, v).
        w_o: Output projection (h, v, e); None concatenates the heads.
        b_o: Output bias (e,) or None.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights.

    References:
        Dasoulas, Scaman and Virmaux, "Lipschitz normalization for self-attention layers", ICML 2021 (scores as in the
        authors' code for transformers).
    """

    w_q: Float[Tensor, "h d k"]
    w_k: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None = None
    b_o: Float[Tensor, "e"] | None = None

    feature_names: ClassVar[Mapping[str, str]] = HEAD_FEATURES
    formula = staticmethod(lipschitznorm_attention)
