"""LayerNorm and RMSNorm, token by token."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.bounds import Upper, round_up
from attnrobust.errors import UnsupportedModelError, first_line
from attnrobust.layers._heads import Specification, adopt_number, adopt_weights, require_shapes
from attnrobust.layers.adapters import own_float64, refuse
from attnrobust.layers.agreement import call_in_float64, float64_twin


class _Normalisation(Specification):
    weight: Float[Tensor, "d"]
    bias: Float[Tensor, "d"] | None
    eps: float

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


def normalisation_from_torch(module: nn.Module) -> LayerNorm | RMSNorm:
    """Read an ``nn.LayerNorm`` or ``nn.RMSNorm`` over the last axis; the class must be exactly one of the two.

    Raises:
        UnsupportedModelError: Another class, or a norm over several axes.
    """
    if type(module) is not nn.LayerNorm and type(module) is not nn.RMSNorm:
        raise UnsupportedModelError(f"{type(module).__name__} is not exactly torch.nn.LayerNorm or torch.nn.RMSNorm")
    if len(module.normalized_shape) != 1:
        raise refuse(module, f"normalises over {len(module.normalized_shape)} axes; only one token's is modelled")
    given: Tensor | None = module.weight
    weight = torch.ones(module.normalized_shape, dtype=torch.float64) if given is None else own_float64(given)
    if isinstance(module, nn.RMSNorm):
        # Where no eps is given torch takes the machine epsilon of the input's type, in use that of the weights.
        default = torch.finfo(torch.get_default_dtype() if given is None else given.dtype).eps
        norm: LayerNorm | RMSNorm = RMSNorm(weight=weight, eps=default if module.eps is None else module.eps)
    else:
        bias: Tensor | None = module.bias
        norm = LayerNorm(weight=weight, bias=None if bias is None else own_float64(bias), eps=module.eps)
    _check(norm, module)
    return norm


def _check(norm: LayerNorm | RMSNorm, module: nn.Module) -> None:
    """One float64 call of the module, hooks included, must give the specification's values."""
    twin: Any = float64_twin(module)
    twin.eps = norm.eps  # where torch takes it from the input's type
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, norm.width, generator=generator, dtype=torch.float64).to(norm.weight.device)
    try:
        actual = call_in_float64(twin, (tokens,), {})
    except Exception as error:  # hooks may raise anything
        raise refuse(module, f"could not be called to check its specification: {first_line(error)}") from error
    size = math.sqrt(norm.width) * norm.weight.abs() + (0.0 if norm.bias is None else norm.bias.abs())
    if not bool(((norm(tokens) - actual).abs() <= 1e-12 * size).all()):  # float64 agrees to ~1e-15 of the terms
        raise refuse(module, "its own forward call differs from the specification; remove its hooks or own forward")
