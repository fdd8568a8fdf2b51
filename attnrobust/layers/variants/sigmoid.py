"""Sigmoid attention: every token is weighed by itself, without a softmax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import HEAD_FEATURES, ScaledHeadSpecification, adopt_number, combine, project


def sigmoid_attention(
    x: Float[Tensor, "*b n d"],
    mass: Float[Tensor, "*m n"] | None,
    *,
    w_q: Float[Tensor, "h d k"],
    w_k: Float[Tensor, "h d k"],
    w_v: Float[Tensor, "h d v"],
    w_o: Float[Tensor, "h v e"] | None,
    b_o: Float[Tensor, "e"] | None,
    scale: float,
    shift: float,
) -> Float[Tensor, "*b n e"]:
    """The formula of ``SigmoidAttention`` in the precision of its arguments, differentiable."""
    scores = scale * project(x, w_q) @ project(x, w_k).transpose(-1, -2)
    weights = torch.sigmoid(scores + shift) * (1.0 / x.shape[-2] if mass is None else mass[..., None, None, :])
    return combine(weights @ project(x, w_v), w_o, b_o)


@dataclass(frozen=True, eq=False)
class SigmoidAttention(ScaledHeadSpecification):
    """Sigmoid attention: ``f(X)_i = sum_h (sum_j mass_j sigma(s_ij + shift) x_j w_v^h) w_o^h + b_o``.

    ``s_ij = scale <x_i w_q, x_j w_k>``, ``sigma(t) = 1/(1 + e^-t)``; equal masses are 1/n each. The sum over tokens is
    thus an average, and the layer a function of the token measure.

    Args:
        w_q: Query weights (h, d, k).
        w_k: Key weights (h, d, k).
        w_v: Value weights (h, d, v).
        w_o: Output projection (h, v, e); None concatenates the heads.
        b_o: Output bias (e,) or None.
        scale: Factor on the scores; None means 1/sqrt(k).
        shift: Added to every score.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, a scale or shift that is not finite.
    """

    w_q: Float[Tensor, "h d k"]
    w_k: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None = None
    b_o: Float[Tensor, "e"] | None = None
    scale: float | None = None
    shift: float = 0.0

    feature_names: ClassVar[Mapping[str, str]] = {**HEAD_FEATURES, "scale": PLAIN, "shift": PLAIN}
    formula = staticmethod(sigmoid_attention)

    def __post_init__(self) -> None:
        super().__post_init__()
        adopt_number(self, "shift", positive=False)
