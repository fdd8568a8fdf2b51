"""One input of a whole network as the search evaluates it: fused operations, in float32 where that is exact enough."""

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.search.prepared_network import prepared_network
from attnrobust.attacks.search.stacked_goal import StackedGoal
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.network_graph import NetworkGraph

SINGLE_NOISE = 1e-5
"""The search runs in float32 where its used shares at the clean input are off by at most this; it tells differences of
1e-4 apart. Rounding of the tokens is part of it, so goals that tiny moves break are searched in float64."""
DOUBLE_NOISE = 1e-12


class GraphInput:
    """A graph at one input; what it gives is never a result, those are evaluated by the graph itself.

    Args:
        graph: The network.
        points: The clean tokens.
        mass: Their masses, or None where they are equal.
        goal: The goal of this one problem.
    """

    def __init__(
        self, graph: NetworkGraph, points: Float[Tensor, "n d"], mass: Float[Tensor, "n"] | None, goal: StackedGoal
    ) -> None:
        self.graph, self.points, self.mass, self.goal = graph, points, mass, goal

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the search, by the used share at the clean input, which is 0."""
        with torch.no_grad():
            shares = self.goal.shares(self._value(self.points[None], torch.float32)[None])
        noise = float(shares.abs().nan_to_num(math.inf, math.inf, math.inf).max())
        return torch.float32 if noise <= SINGLE_NOISE else torch.float64

    @property
    def resolution(self) -> float:
        """What is taken for a used share of exactly 1."""
        return 2.0 * SINGLE_NOISE if self.dtype is torch.float32 else DOUBLE_NOISE

    def value(self, x: Float[Tensor, "r n d"]) -> Float[Tensor, "r m e"]:
        """The output, as float64 numbers; differentiable once."""
        return self._value(x, self.dtype)

    def _value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        mass = None if self.mass is None else self.mass.expand(x.shape[0], -1)
        masses = self.graph.masses(mass, int(x.shape[-2]))
        return prepared_network(self.graph, dtype)(x, masses).to(torch.float64)

    @cached_property
    def linear(self) -> Linearisation:
        """The graph at the clean input: fused attention cannot be differentiated twice."""
        return self.graph.linearise(self.points, self.mass)

    def normal_product(self, vectors: Float[Tensor, "r n d"]) -> Float[Tensor, "r n d"]:
        """``J^T J v`` of the pooled output."""
        image = self.goal.pool(self.linear.jvp(vectors)[None])
        return self.linear.vjp(self.goal.unpool(image)[0])
