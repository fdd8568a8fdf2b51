"""LayerNorm and RMSNorm, token by token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import Specification, adopt_number, adopt_weights, require_shapes
from attnrobust.numerics.sides import Upper, round_up


class _Normalisation(Specification):
    weight: Float[Tensor, "d"]
    bias: Float[Tensor, "d"] | None
    eps: float

    feature_names: ClassVar[Mapping[str, str]] = {"weight": PLAIN, "bias": "bias", "eps": PLAIN}

    def __post_init__(self) -> None:
        adopt_weights(self, weight=1, bias=1)
        require_shapes(self, {"bias": (self.width,)})
        adopt_number(self, "eps")

    @property
    def width(self) -> int:
        return int(self.weight.shape[0])

    @property
    def out_width(self) -> int:
        return self.width

    @property
    def output_radius(self) -> Upper:
        """Every output token is within this l2 distance of 0 for every input: ``max|weight| sqrt(d) + |bias|``."""
        offset = 0.0 if self.bias is None else float(torch.linalg.vector_norm(self.bias))
        return Upper(round_up(float(self.weight.abs().max()) * math.sqrt(self.width) + offset))

    @property
    def lipschitz(self) -> Upper:
        """Lipschitz constant (l2, one token, all of space): at most ``max|weight| / sqrt(eps)``."""
        return Upper(round_up(float(self.weight.abs().max()) / math.sqrt(self.eps)))


@dataclass(frozen=True, eq=False)
class LayerNorm(_Normalisation):
    """``f(X)_i = weight * (x_i - mean_i) / sqrt(var_i + eps) + bias`` with mean and variance (1/d) over one token.

    Args:
        weight: Factors (d,).
        bias: Offsets (d,) or None.
        eps: Added to the variance, > 0.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, eps that is not positive.
    """

    weight: Float[Tensor, "d"]
    bias: Float[Tensor, "d"] | None = None
    eps: float = 1e-5

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        return nn.functional.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


@dataclass(frozen=True, eq=False)
class RMSNorm(_Normalisation):
    """``f(X)_i = weight * x_i / sqrt(|x_i|^2 / d + eps) + bias``.

    Args:
        weight: Factors (d,).
        bias: Offsets (d,) or None.
        eps: Added to the mean square, > 0.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, eps that is not positive.
    """

    weight: Float[Tensor, "d"]
    bias: Float[Tensor, "d"] | None = None
    eps: float = 1e-6

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        out = nn.functional.rms_norm(x, (self.width,), self.weight, self.eps)
        return out if self.bias is None else out + self.bias
