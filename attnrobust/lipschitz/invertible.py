"""Invertible attention: a residual whose branch is proved to be a contraction."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.kim2021_l2 import derived_constant
from attnrobust.errors import InputError
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.fixed_point import FixedPoint, iterate
from attnrobust.numerics.sides import Upper
from attnrobust.tokens import tensor_digest


@dataclass(frozen=True, eq=False)
class ContractiveResidual:
    """``y = x + g(x)``, ``g = share / constant * layer``: invertible, because g is a contraction of rate ``share``.

    Args:
        layer: Any map of tokens to tokens of the same width.
        constant: Upper bound of its Frobenius Lipschitz constant on inputs of at most ``tokens`` tokens of equal mass.
        share: c in (0, 1).
        tokens: Largest number of tokens.

    Raises:
        InputError: A share outside (0, 1), a constant that is not positive, finite and deterministic, another width.
    """

    layer: TokenMap
    constant: Upper
    share: float
    tokens: int

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise InputError(f"the share must be in (0, 1); got {self.share}")
        if not 0.0 < self.constant.value < math.inf or self.constant.failure_probability > 0:
            raise InputError("the Lipschitz constant must be positive, finite and deterministic")
        if self.layer.out_width != self.layer.width:
            raise InputError(f"the layer maps width {self.layer.width} to {self.layer.out_width}; they must agree")
        if self.tokens < 1:
            raise InputError(f"tokens must be >= 1; got {self.tokens}")

    @classmethod
    def of_l2(cls, layer: L2Attention, *, tokens: int, share: float = 0.9) -> "ContractiveResidual":
        """The invertible layer of L2 attention with its derived constant."""
        return cls(layer, derived_constant(layer, tokens), share, tokens)

    @property
    def width(self) -> int:
        """Token width d."""
        return self.layer.width

    @property
    def out_width(self) -> int:
        """Token width d again."""
        return self.layer.out_width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of layer, constant and share."""
        return tensor_digest(extra=f"contractive;{self.layer.digest};{self.constant.value!r};{self.share!r}")

    def branch(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The contraction g."""
        if x.shape[-2] > self.tokens:
            raise InputError(f"the constant is for at most {self.tokens} tokens; the input has {x.shape[-2]}")
        return self.share / self.constant.value * self.layer(x)

    def __call__(self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None) -> Tensor:
        """Evaluate ``x + g(x)`` for equal masses."""
        if mass is not None:
            raise InputError("the constant is for tokens of equal mass; leave the masses out")
        return x + self.branch(x)

    def inverse(self, y: Float[Tensor, "n d"], *, tolerance: float = 1e-12) -> FixedPoint:
        """The x with ``x + g(x) = y``, by ``x <- y - g(x)``: rate ``share``, whatever y.

        Args:
            y: An output.
            tolerance: Frobenius distance to the exact x, > 0; near rounding the iteration stops where it stalls.

        Returns:
            x, with a bound of its error in exact arithmetic.
        """
        return iterate(lambda x: y - self.branch(x), y.detach(), Upper(self.share), _frobenius, tolerance)

    def equilibrium(self, x: Float[Tensor, "n d"], *, tolerance: float = 1e-12) -> FixedPoint:
        """The z with ``z = x + g(z)``: the output of infinitely many layers with shared weights and the input injected.

        Args:
            x: The injected input.
            tolerance: Frobenius distance to the exact z, > 0.
        """
        return iterate(lambda z: x + self.branch(z), x.detach(), Upper(self.share), _frobenius, tolerance)


def _frobenius(step: Tensor) -> float:
    return float(torch.linalg.vector_norm(step))
