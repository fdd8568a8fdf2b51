"""Remainders of activations and of the product of two edges, entry by entry."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.nodes.activation_bounds import SUPREMA
from attnrobust.certify.network.composite.nodes.base import Channel, Form, NodeRemainder, Reach, largest_eigenvalues
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.activation_functions import FUNCTIONS, Activation
from attnrobust.layers.graph.node import Edges
from attnrobust.numerics.rounding import ENTRY, FORMULA, SMALLEST, outward

FLOOR = 5e-2  # of the global third derivative: a neuron whose own vanishes still bends within the range


class ActivateRemainder(NodeRemainder):
    """Remainder of an activation, measured per neuron with the importance of its output.

    Args:
        port: What it reads.
        function: The activation.
        x: Clean entries.
        importance: Positive weights of the entries of the output.
    """

    def __init__(
        self, port: Port, function: Activation, x: Float[Tensor, "n d"], importance: Float[Tensor, "n d"]
    ) -> None:
        super().__init__(port)
        self._suprema = SUPREMA[function]
        higher = FUNCTIONS[function].higher
        assert higher is not None  # noqa: S101 - an activation without was refused; narrows the type
        second, third = higher(x)
        self._second, self._third = outward(second.abs(), ENTRY), outward(third.abs(), ENTRY)
        self._importance, self._square = importance, torch.zeros_like(x)

    @property
    def channels(self) -> Mapping[str, Channel]:
        weigh = lambda t: t / self._importance  # noqa: E731
        return {"own": Channel(weigh, weigh, tuple(self._importance.shape))}

    def observe(self, edges: Edges) -> None:
        self._square += edges[0].square().sum(0)

    def settle(self) -> None:
        tangent = outward(self._square.sqrt(), ENTRY)
        weights = (self._importance * (self._third + FLOOR * self._suprema.third) * tangent.square()).square()
        weights = weights + 1e-6 * weights.mean() + SMALLEST
        raw, joint = raw_entries(self.port, 0, weights)
        self._reach = Reach(tangent, raw, weights, joint)

    def curved(self) -> Channel:
        weigh = lambda t: t * self._importance  # noqa: E731
        return Channel(weigh, weigh, tuple(self._importance.shape))

    def form(self) -> Form:
        root = self._reach.weights.sqrt()
        return Form(
            lambda edges: (root * edges[0]).flatten(-2),
            lambda flat: (root * flat.unflatten(-1, tuple(root.shape)),),
        )

    def _bends(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """``|Rem| <= b_2 E^2`` and ``|Rem - 1/2 f'' e^2| <= b_3 E^2`` per entry."""
        least = (self._second + self._suprema.third * size).clamp_max(self._suprema.second)
        whole = 0.5 * least
        cubic = (self._third + self._suprema.fourth * size).clamp_max(self._suprema.third) * size / 6.0
        return whole, torch.minimum(cubic, whole + 0.5 * self._second)

    def beyond(self, radius: float, rho: float) -> Mapping[str, float]:
        size = self._reach.sizes(radius, rho)
        third = self._reach.stacked(self._importance * self._bends(size)[1] * size, radius, rho, self.joint)
        return {"own": third + outward(0.5 * self._own_curvature() * rho**2, FORMULA)}

    def _own_curvature(self) -> float:
        """``|f''[R, R]| <= kappa rho^2``; per token also ``sum c^2 (w.R)^4 <= max c |w|^2 rho^2 sum c (w.R)^2``."""
        weights = self._importance * self._second
        largest = weights * self._reach.raw.square()
        if self.port.maps[0] is None:
            plain = float(largest.max())
        else:
            plain = (float(largest.max()) * raw_entries(self.port, 0, weights)[1] ** 2) ** 0.5
        return plain if self.kappa is None else min(plain, self.kappa)

    def whole(self, radius: float, rho: float) -> Mapping[str, float]:
        size = self._reach.sizes(radius, rho)
        return {"own": self._reach.stacked(self._importance * self._bends(size)[0] * size, radius, rho, self.joint)}


class ProductRemainder(NodeRemainder):
    """``Rem = e_1 e_2`` entry by entry: no third order.

    Args:
        port: What it reads: two edges.
        importance: Positive weights of the entries of the output.
    """

    def __init__(self, port: Port, importance: Float[Tensor, "n d"]) -> None:
        super().__init__(port)
        self._importance = importance
        self._squares = [torch.zeros_like(importance) for _ in port.scales]

    @property
    def channels(self) -> Mapping[str, Channel]:
        weigh = lambda t: t / self._importance  # noqa: E731
        return {"own": Channel(weigh, weigh, tuple(self._importance.shape))}

    def observe(self, edges: Edges) -> None:
        for square, edge in zip(self._squares, edges, strict=True):
            square += edge.square().sum(0)

    def settle(self) -> None:
        self._tangents = [outward(square.sqrt(), ENTRY) for square in self._squares]
        self._raw = [raw_entries(self.port, edge, self._importance)[0] for edge in range(2)]

    def beyond(self, radius: float, rho: float) -> Mapping[str, float]:
        """``|R_1 R_2| <= rho^2 / 2 times the largest raw_1 J_2 or J_1 raw_2``, J the joint norms with importance."""
        ones = torch.ones_like(self._importance)
        joints = [raw_entries(self.port, edge, ones)[1] for edge in range(2)]
        weighed = [float((self._importance * raw).max()) for raw in self._raw]
        return {"own": outward(0.5 * min(weighed[0] * joints[1], weighed[1] * joints[0]), FORMULA) * rho**2}

    def whole(self, radius: float, rho: float) -> Mapping[str, float]:
        sizes = [t * radius + raw * rho for t, raw in zip(self._tangents, self._raw, strict=True)]
        return {"own": float(outward((self._importance * sizes[0] * sizes[1]).square().sum().sqrt(), FORMULA))}


def raw_entries(port: Port, edge: int, weights: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], float]:
    """``sup |R_k|`` of every entry of an edge, and ``sup (sum_k weights_k R_k^2)^{1/2}``, over metric norms 1."""
    inverse, matrix = 1.0 / port.scales[edge].amin(-1, keepdim=True), port.maps[edge]
    if matrix is None:
        raw = inverse.expand_as(weights)
        return outward(raw, ENTRY), float(outward((weights.sqrt() * raw).max(), ENTRY))
    raw = inverse * torch.linalg.vector_norm(matrix, dim=0)
    gram = torch.stack([(matrix * row) @ matrix.T for row in weights])
    return outward(raw, ENTRY), float(outward((largest_eigenvalues(gram).sqrt() * inverse[:, 0]).max(), ENTRY))
