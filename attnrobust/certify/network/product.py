"""Whole networks by the product of what every node does: the move of each state from those of the states it reads."""

from typing import ClassVar

import torch

from attnrobust.certify.method import CertificateMethod, PreparedBound
from attnrobust.certify.network.node_bounds.registry import NODE_FEATURES, bound_of
from attnrobust.certify.network.propagation import BoundOf, Network, goal_changes, threat_move
from attnrobust.certify.radius import LARGEST
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.numerics.chance import SIDE_FAILURE, Chance
from attnrobust.numerics.rounding import FORMULA, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem

EVENTS = 128  # eigenvalue bounds of the attention nodes that a radius is likely to need
PROBE = 1e-6  # a size at which nearly everything is in its linear part


class NetworkProduct(CertificateMethod):
    """Moves from node to node: every node's bound on the ball that its inputs may move in, residuals by the triangle.

    Norms of the network's own matrices, activations and norms on their own ranges, attention by its derivative and
    remainder. Sound at every size and finite: LayerNorm and the softmax saturate.

    References:
        Derived; docs/network-certificates.md, theorem 1.
    """

    name: ClassVar[str] = "network-product"
    reference: ClassVar[str] = "derived; docs/network-certificates.md, theorem 1"
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"
    relative_tolerance: ClassVar[float] = 1e-2
    layers = (NetworkGraph,)
    features = NODE_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return PropagatedBound(problem, seed=seed, name=self.name)


class PropagatedBound(PreparedBound):
    """The used share from the moves of all states.

    Args:
        problem: The question.
        seed: Seed of random start vectors.
        name: The certificate's.
        bound: The bound of every node.
    """

    @torch.no_grad()
    def __init__(self, problem: Problem, *, seed: int, name: str, bound: BoundOf = bound_of) -> None:
        self._problem = problem
        self._chance = Chance(seed, name, SIDE_FAILURE, EVENTS)
        self._network = Network.of(problem, self._chance, bound)

    @property
    def failure_probability(self) -> float:
        return self._chance.spent

    @property
    def first_guess(self) -> float | None:
        slope = self.usage(PROBE).value / PROBE
        return 0.5 / slope if 1.0 / LARGEST < slope < LARGEST else None

    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        moves, _ = self._network.moves(threat_move(self._problem, radius))
        goal = self._problem.resolved
        changes = goal_changes(goal, moves[self._network.wiring.output])
        return Upper(used_share(changes, goal.budgets, share=FORMULA), self._chance.spent)
