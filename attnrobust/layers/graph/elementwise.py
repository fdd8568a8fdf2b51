"""Nodes that act entry by entry: activations, and the product of two edges."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, get_args

import torch
from torch import Tensor

from attnrobust.errors import UnknownNameError, UnsupportedModelError
from attnrobust.layers.graph.activation_functions import FUNCTIONS, Activation, Scalar
from attnrobust.layers.graph.node import Edges, Node, NodeState, require_equal_rows, require_equal_widths


@dataclass(frozen=True, eq=False)
class Activate(Node):
    """``f(X)_ik = function(x_ik)``.

    Args:
        function: "relu", "gelu" (exact), "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid" or "identity".

    ReLU has no derivative at 0 (``jvp`` takes 0 there, as torch does) and no Taylor form: ``features`` raises
    ``UnsupportedModelError``.

    Raises:
        UnknownNameError: A function that is not modelled.
    """

    function: Activation

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise UnknownNameError("activation", str(self.function), get_args(Activation))

    @property
    def kind(self) -> str:
        return f"Activate({self.function})"

    @property
    def features(self) -> frozenset[str]:
        """The class and the function."""
        return frozenset({type(self).__name__, self.kind})

    def out_width(self, widths: tuple[int, ...]) -> int:
        return widths[0]

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        return FUNCTIONS[self.function].value(inputs[0])

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Tensor]:
        return _ActivationState(self.function, FUNCTIONS[self.function], inputs[0])


@dataclass(frozen=True, eq=False)
class _ActivationState(NodeState[Tensor]):
    name: str
    scalar: Scalar
    x: Tensor

    @cached_property
    def _slope(self) -> Tensor:
        return self.scalar.slope(self.x)

    @cached_property
    def _higher(self) -> tuple[Tensor, Tensor]:
        if self.scalar.higher is None:
            raise UnsupportedModelError(f"{self.name} has no second derivative, so this node has no Taylor form")
        return self.scalar.higher(self.x)

    def jvp(self, a: Edges) -> Tensor:
        return self._slope * a[0]

    def vjp(self, y: Tensor) -> Edges:
        return (self._slope * y,)

    def features(self, a: Edges) -> Tensor:
        _ = self._higher
        return a[0]

    def bilinear(self, a: Tensor, b: Tensor) -> Tensor:
        return self._higher[0] * a * b

    def bilinear_adjoint(self, a: Tensor, y: Tensor) -> Edges:
        return (self._higher[0] * a * y,)

    def trilinear(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self._higher[1] * a * b * c

    def trilinear_adjoint(self, a: Tensor, b: Tensor, y: Tensor) -> Edges:
        return (self._higher[1] * a * b * y,)


@dataclass(frozen=True, eq=False)
class Product(Node):
    """``f(X, Y)_ik = x_ik y_ik``: the gate of a gated MLP, on two edges with equally many tokens of one width."""

    arity: ClassVar[int] = 2

    def out_width(self, widths: tuple[int, ...]) -> int:
        return require_equal_widths(self.kind, widths)

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        require_equal_rows(self.kind, inputs)
        return inputs[0] * inputs[1]

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _ProductState(inputs[0], inputs[1])


@dataclass(frozen=True, eq=False)
class _ProductState(NodeState[Edges]):
    x: Tensor
    y: Tensor

    def jvp(self, a: Edges) -> Tensor:
        return a[0] * self.y + self.x * a[1]

    def vjp(self, y: Tensor) -> Edges:
        return (y * self.y, y * self.x)

    def features(self, a: Edges) -> Edges:
        return a

    def bilinear(self, a: Edges, b: Edges) -> Tensor:
        return a[0] * b[1] + b[0] * a[1]

    def bilinear_adjoint(self, a: Edges, y: Tensor) -> Edges:
        return (y * a[1], y * a[0])

    def trilinear(self, a: Edges, b: Edges, c: Edges) -> Tensor:
        return a[0].new_zeros(torch.broadcast_shapes(*(edge.shape for edges in (a, b, c) for edge in edges)))

    def trilinear_adjoint(self, a: Edges, b: Edges, y: Tensor) -> Edges:
        zero = y.new_zeros(torch.broadcast_shapes(y.shape, *(edge.shape for edges in (a, b) for edge in edges)))
        return (zero, zero)
