"""Scaled cosine similarity attention: queries, keys and values of bounded length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import HEAD_FEATURES, HeadSpecification, adopt_number, combine, project, softmax_average


def smooth_unit(y: Float[Tensor, "..."], eps: float) -> Float[Tensor, "..."]:
    """``y / sqrt(|y|^2 + eps)`` along the last axis: length below 1, Lipschitz constant 1/sqrt(eps)."""
    return y * torch.rsqrt(y.square().sum(dim=-1, keepdim=True) + eps)


def cosine_attention(
    x: Float[Tensor, "*b n d"],
    mass: Float[Tensor, "*m n"] | None,
    *,
    w_q: Float[Tensor, "h d k"],
    w_k: Float[Tensor, "h d k"],
    w_v: Float[Tensor, "h d v"],
    w_o: Float[Tensor, "h v e"] | None,
    b_o: Float[Tensor, "e"] | None,
    tau: float,
    nu: float,
    eps: float,
) -> Float[Tensor, "*b n e"]:
    """The formula of ``CosineAttention`` in the precision of its arguments, differentiable."""
    q, k, v = (smooth_unit(project(x, weight), eps) for weight in (w_q, w_k, w_v))
    return combine(nu * softmax_average(tau * q @ k.transpose(-1, -2), v, mass), w_o, b_o)


@dataclass(frozen=True, eq=False)
class CosineAttention(HeadSpecification):
    """Scaled cosine attention: ``f(X)_i = sum_h nu (sum_j P^h_ij g(x_j w_v^h)) w_o^h + b_o``.

    ``g(y) = y / sqrt(|y|^2 + eps)`` row by row, ``P_ij = softmax_j(tau <g(x_i w_q), g(x_j w_k)> + log mass_j)``.
    Queries, keys and values are all normalised; each ``g`` is 1/sqrt(eps)-Lipschitz with values in the unit ball.

    Args:
        w_q: Query weights (h, d, k).
        w_k: Key weights (h, d, k).
        w_v: Value weights (h, d, v).
        w_o: Output projection (h, v, e); None concatenates the heads.
        b_o: Output bias (e,) or None.
        tau: Factor on the cosines, > 0.
        nu: Factor on the output of every head, > 0.
        eps: Smoothing of the norms, > 0.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, numbers that are not positive.

    References:
        Qi et al., "LipsFormer", ICLR 2023; Nair, arXiv 2510.23012, Theorem 2.
    """

    w_q: Float[Tensor, "h d k"]
    w_k: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None = None
    b_o: Float[Tensor, "e"] | None = None
    tau: float = 1.0
    nu: float = 1.0
    eps: float = 1e-6

    feature_names: ClassVar[Mapping[str, str]] = {**HEAD_FEATURES, "tau": PLAIN, "nu": PLAIN, "eps": PLAIN}
    formula = staticmethod(cosine_attention)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "nu", "eps"):
            adopt_number(self, name)
