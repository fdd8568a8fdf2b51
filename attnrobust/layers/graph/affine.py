"""Affine nodes: token-wise maps, scaling, residual sums."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.node import (
    AffineState,
    Edges,
    Node,
    NodeState,
    require_equal_rows,
    require_equal_widths,
    require_width,
)
from attnrobust.tokens import require_finite


@dataclass(frozen=True, eq=False)
class Affine(Node):
    """``f(X)_i = x_i weight + bias``: a linear layer on every token, or on the pooled one.

    Args:
        weight: Weights (d, e), the transpose of ``torch.nn.Linear.weight``.
        bias: Offsets (e,) or None.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights.
    """

    weight: Float[Tensor, "d e"]
    bias: Float[Tensor, "e"] | None = None
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        weight = require_finite("weight", self.weight)
        if weight.ndim != 2 or 0 in weight.shape:
            raise InputError(f"weight must have shape (d, e) with d, e >= 1; got {tuple(weight.shape)}")
        object.__setattr__(self, "weight", weight)
        if self.bias is None:
            return
        if tuple(self.bias.shape) != (weight.shape[1],):
            raise InputError(f"bias must have shape ({weight.shape[1]},); got {tuple(self.bias.shape)}")
        object.__setattr__(self, "bias", require_finite("bias", self.bias))

    def out_width(self, widths: tuple[int, ...]) -> int:
        require_width(self.kind, int(self.weight.shape[0]), widths)
        return int(self.weight.shape[1])

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        out = inputs[0] @ self.weight
        return out if self.bias is None else out + self.bias

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _MatrixState(self.weight)


@dataclass(frozen=True)
class _MatrixState(AffineState):
    weight: Tensor

    def jvp(self, a: Edges) -> Tensor:
        return a[0] @ self.weight

    def vjp(self, y: Tensor) -> Edges:
        return (y @ self.weight.T,)


@dataclass(frozen=True, eq=False)
class Scale(Node):
    """``f(X)_i = factor * x_i`` with one number or one per coordinate.

    Args:
        factor: A number, a tensor without dimensions, or (d,).

    Raises:
        InputError: Another shape, NaN or infinite factors.
    """

    factor: Tensor | float
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.factor
        factor = given if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64)
        factor = require_finite("factor", factor)
        if factor.ndim > 1 or 0 in factor.shape:
            raise InputError(f"factor must be one number or have shape (d,); got {tuple(factor.shape)}")
        object.__setattr__(self, "factor", factor)

    def out_width(self, widths: tuple[int, ...]) -> int:
        factor = self._factor
        if factor.ndim == 1:
            require_width(self.kind, int(factor.shape[0]), widths)
        return widths[0]

    @property
    def _factor(self) -> Tensor:
        assert isinstance(self.factor, Tensor)  # noqa: S101 - set in __post_init__; narrows the type
        return self.factor

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        return inputs[0] * self._factor

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _ScaleState(self._factor)


@dataclass(frozen=True)
class _ScaleState(AffineState):
    factor: Tensor

    def jvp(self, a: Edges) -> Tensor:
        return a[0] * self.factor

    def vjp(self, y: Tensor) -> Edges:
        return (y * self.factor,)


@dataclass(frozen=True, eq=False)
class Sum(Node):
    """``f(X, Y) = X + Y``: the residual sum of two edges with equally many tokens of one width."""

    arity: ClassVar[int] = 2
    affine: ClassVar[bool] = True

    def out_width(self, widths: tuple[int, ...]) -> int:
        return require_equal_widths(self.kind, widths)

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        require_equal_rows(self.kind, inputs)
        return inputs[0] + inputs[1]

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _SumState()


class _SumState(AffineState):
    def jvp(self, a: Edges) -> Tensor:
        return a[0] + a[1]

    def vjp(self, y: Tensor) -> Edges:
        return (y, y)
