"""Remainders of activations and of the product of two edges, entry by entry."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.nodes.activation_bounds import SUPREMA, oscillation
from attnrobust.certify.network.composite.nodes.base import (
    Ball,
    Channel,
    Form,
    NodeRemainder,
    Reach,
    largest_eigenvalues,
    mean_square,
    remainder_size,
)
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

    counts_maps = True

    def __init__(
        self, port: Port, function: Activation, x: Float[Tensor, "n d"], importance: Float[Tensor, "n d"]
    ) -> None:
        super().__init__(port)
        self._suprema = SUPREMA[function]
        higher = FUNCTIONS[function].higher
        assert higher is not None  # noqa: S101 - an activation without was refused; narrows the type
        second, third = higher(x)
        self._second, self._third = outward(second.abs(), ENTRY), outward(third.abs(), ENTRY)
        self._x, self._scalar = x, FUNCTIONS[function]
        self._importance = importance
        self._square, self._second_square = torch.zeros_like(x), torch.zeros_like(x)

    @property
    def channels(self) -> Mapping[str, Channel]:
        weigh = lambda t: t / self._importance  # noqa: E731
        return {"own": Channel(weigh, weigh, tuple(self._importance.shape))}

    @property
    def features(self) -> int:
        return self._importance.numel()

    def observe(self, edges: Edges) -> None:
        self._square += edges[0].square().sum(0)

    def observe_second(self, edges: Edges) -> None:
        self._second_square += edges[0].square().sum(0)

    def settle(self) -> None:
        tangent = outward(self._square.sqrt(), ENTRY)
        weights = (self._importance * (self._third + FLOOR * self._suprema.third) * tangent.square()).square()
        weights = weights + 1e-6 * weights.mean() + SMALLEST
        raw = raw_sizes(self.port, 0, weights)
        bend = outward(self._second_square.sqrt(), ENTRY)
        form = partial(raw_joint, self.port, 0)
        self._shape = Reach(tangent, bend, raw, weights, raw_form=form, unit=self._importance)

    def own_metric(self) -> Edges:
        """The importance of its entries."""
        return (self._importance,)

    @property
    def _reach(self) -> Reach:
        return replace(self._shape, joint=self.joints.get("own"))

    @property
    def forms(self) -> Mapping[str, Form]:
        root = self._shape.weights.sqrt()
        form = Form(
            lambda edges: (root * edges[0]).flatten(-2),
            lambda flat: (root * flat.unflatten(-1, tuple(root.shape)),),
        )
        return {"own": form}

    def _least(self, size: Tensor) -> Tensor:
        """``|f''|`` on the range, at most."""
        return (self._second + self._suprema.third * size).clamp_max(self._suprema.second)

    def _third_order(self, size: Tensor) -> Tensor:
        """B with ``|Rem - 1/2 f'' e^2| <= B |e|^2``."""
        cubic = (self._third + self._suprema.fourth * size).clamp_max(self._suprema.third) * size / 6.0
        bent = torch.minimum(0.5 * (self._least(size) + self._second), 0.5 * self._bent_oscillation(size))
        return torch.minimum(cubic, bent)

    def _bent_oscillation(self, size: Tensor) -> Tensor:
        """``|f''(y) - f''(x)|`` on the range, at most."""
        higher = self._scalar.higher
        assert higher is not None  # noqa: S101 - as above
        return oscillation(lambda y: higher(y)[0], self._suprema.third, self._x, size)

    def _turn(self, size: Tensor) -> Tensor:
        """``|f'(y) - f'(x)|`` on the range, at most."""
        taylor = torch.minimum(self._second + 0.5 * self._suprema.third * size, self._least(size)) * size
        return torch.minimum(taylor, oscillation(self._scalar.slope, self._suprema.second, self._x, size))

    def lift(self, ball: Ball) -> Mapping[str, float]:
        """``sup |f'(y) - f'(x)|`` per neuron times R."""
        turn = self._turn(self._reach.sizes(ball))
        return {"own": self._reach.stacked_rest(self._importance * turn, ball)}

    def drift(self, ball: Ball) -> Mapping[str, float]:
        """Per neuron times R: ``sup |f'''| (a^2 + a b + b^2/3) / 2 + |f''| b / 2``, or in two parts."""
        size, first, rest = self._reach.sizes(ball), self._reach.first(ball), self._reach.rest(ball)
        steepest = (self._third + self._suprema.fourth * size).clamp_max(self._suprema.third)
        near = 0.5 * (steepest * mean_square(first, rest) + self._second * rest)
        turn = torch.minimum(near, self._turn(size) + self._second * first)
        return {"own": self._reach.stacked_rest(self._importance * turn, ball)}

    def _fourth_order(self, size: Tensor) -> Tensor:
        """B with ``|Rem - 1/2 f'' e^2 - C3(e)| <= B |e|^2``."""
        quartic = self._suprema.fourth * size.square() / 24.0
        return torch.minimum(quartic, self._third_order(size) + self._third * size / 6.0)

    def whole(self, ball: Ball) -> Mapping[str, float]:
        size = self._reach.sizes(ball)
        return {"own": self._reach.stacked(self._importance * 0.5 * self._least(size) * size, ball)}

    def beyond(self, ball: Ball) -> Mapping[str, float]:
        size = self._reach.sizes(ball)
        third = self._reach.stacked(self._importance * self._third_order(size) * size, ball)
        return {"own": third + self._quadratic(ball)}

    def quadratic(self, ball: Ball) -> Mapping[str, float]:
        return {"own": self._quadratic(ball)}

    def third_readout(self, cotangent: Tensor, ball: Ball) -> float:
        """``sum_k |c_k| B_k e_k^2``."""
        factor = (cotangent.abs() * self._third_order(self._reach.sizes(ball))).sqrt()
        return outward(self._reach.stacked(factor, ball) ** 2, FORMULA)

    def further(self, ball: Ball) -> Mapping[str, float]:
        """Fourth order, and ``C3(e) - C3(T D) = f'''/6 R (3 (T D)^2 + 3 (T D) R + R^2)``."""
        reach = self._reach
        size, first, rest = reach.sizes(ball), reach.first(ball), reach.rest(ball)
        fourth = reach.stacked(self._importance * self._fourth_order(size) * size, ball)
        change = self._third / 6.0 * (3.0 * first.square() + 3.0 * first * rest + rest.square())
        changed = reach.stacked_rest(self._importance * change, ball)
        return {"own": fourth + changed + self._quadratic(ball)}

    def _quadratic(self, ball: Ball) -> float:
        """``|1/2 f''[R, R]|``: by the norm of the form, neuron by neuron, or R2 by neurons and R' by the form."""
        reach, weights, kappa = self._reach, 0.5 * self._importance * self._second, 0.5 * self._own_curvature
        bent = reach.bent(ball)
        apart = float((weights * reach.rest(ball).square()).square().sum().sqrt())
        mixed = float((weights * bent.square()).square().sum().sqrt())
        mixed = mixed + 2.0 * reach.raw_norm(weights * bent) * ball.rest + kappa * ball.rest**2
        return outward(min(kappa * ball.rho**2, apart, mixed), FORMULA)

    @cached_property
    def _own_curvature(self) -> float:
        """Kappa with ``|f''[R, R]| <= kappa rho^2``: the smaller one of two closed forms per token.

        With c the importance times |f''|: ``sum c^2 (w.R)^4 <= max c |w|^2 rho^2 sum c (w.R)^2``, and as
        ``(w.R)^2 <= |w|^2 rho^2`` also ``<= rho^2 sum c^2 |w|^2 (w.R)^2`` (the unfolding's norm).
        """
        weights, raw = self._importance * self._second, self._shape.raw
        largest = float((weights * raw.square()).max())
        mixed = math.sqrt(largest) * raw_joint(self.port, 0, weights)
        return outward(min(mixed, raw_joint(self.port, 0, (weights * raw).square())), FORMULA)


class ProductRemainder(NodeRemainder):
    """``Rem = e_1 e_2`` entry by entry: no third order.

    Args:
        port: What it reads: two edges.
        importance: Positive weights of the entries of the output.
    """

    counts_maps = True

    def __init__(self, port: Port, importance: Float[Tensor, "n d"]) -> None:
        super().__init__(port)
        self._importance = importance
        self._squares = [torch.zeros_like(importance) for _ in port.scales]
        self._second_squares = [torch.zeros_like(importance) for _ in port.scales]

    @property
    def channels(self) -> Mapping[str, Channel]:
        weigh = lambda t: t / self._importance  # noqa: E731
        return {"own": Channel(weigh, weigh, tuple(self._importance.shape))}

    @property
    def features(self) -> int:
        return 2 * self._importance.numel()

    def observe(self, edges: Edges) -> None:
        for square, edge in zip(self._squares, edges, strict=True):
            square += edge.square().sum(0)

    def observe_second(self, edges: Edges) -> None:
        for square, edge in zip(self._second_squares, edges, strict=True):
            square += edge.square().sum(0)

    def settle(self) -> None:
        self._bends = [outward(square.sqrt(), ENTRY) for square in self._second_squares]
        self._tangents = [outward(square.sqrt(), ENTRY) for square in self._squares]
        self._raw = [raw_sizes(self.port, edge, self._importance) for edge in range(2)]

    def _rests(self, ball: Ball) -> list[Tensor]:
        return [remainder_size(bend, raw, ball) for bend, raw in zip(self._bends, self._raw, strict=True)]

    def whole(self, ball: Ball) -> Mapping[str, float]:
        one, two = (t * ball.radius + rest for t, rest in zip(self._tangents, self._rests(ball), strict=True))
        return {"own": float(outward((self._importance * one * two).square().sum().sqrt(), FORMULA))}

    def beyond(self, ball: Ball) -> Mapping[str, float]:
        """``R_1 R_2``: entry by entry, or ``rho^2 / 2`` times the largest raw_1 J_2 or J_1 raw_2, J the joint norms."""
        one, two = self._rests(ball)
        apart = float((self._importance * one * two).square().sum().sqrt())
        return {"own": outward(min(0.5 * self._largest * ball.rho**2, apart), FORMULA)}

    def further(self, ball: Ball) -> Mapping[str, float]:
        return self.beyond(ball)

    def quadratic(self, ball: Ball) -> Mapping[str, float]:
        return self.beyond(ball)

    def third_readout(self, cotangent: Tensor, ball: Ball) -> float:
        """A product has no third order."""
        return 0.0

    @cached_property
    def _largest(self) -> float:
        joints = [raw_joint(self.port, edge, torch.ones_like(self._importance)) for edge in range(2)]
        weighed = [float((self._importance * raw).max()) for raw in self._raw]
        return min(weighed[0] * joints[1], weighed[1] * joints[0])


def raw_sizes(port: Port, edge: int, like: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """``sup |R_k|`` of every entry of an edge over metric norms 1."""
    inverse, matrix = _thinnest(port, edge), port.maps[edge]
    raw = inverse.expand_as(like) if matrix is None else inverse * torch.linalg.vector_norm(matrix, dim=0)
    return outward(raw, ENTRY)


def raw_joint(port: Port, edge: int, weights: Float[Tensor, "n d"]) -> float:
    """``sup (sum_k weights_k R_k^2)^{1/2}`` over the entries of an edge and over metric norms 1; inf if not finite."""
    if not bool(torch.isfinite(weights).all()):
        return math.inf
    inverse, matrix = _thinnest(port, edge), port.maps[edge]
    if matrix is None:
        return float(outward((weights.sqrt() * inverse).max(), ENTRY))
    gram = torch.stack([(matrix * row) @ matrix.T for row in weights])
    return float(outward((largest_eigenvalues(gram).sqrt() * inverse[:, 0]).max(), ENTRY))


def _thinnest(port: Port, edge: int) -> Float[Tensor, "n 1"]:
    inverse: Tensor = 1.0 / port.scales[edge].amin(-1, keepdim=True)
    return inverse
