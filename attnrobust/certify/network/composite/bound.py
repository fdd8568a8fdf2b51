"""The used budget at one radius: first order exactly, curvature as one object, the rest by the recursion."""

import math
from dataclasses import dataclass

import torch

from attnrobust.certify.method import PreparedBound
from attnrobust.certify.network.composite.preparation import Preparation, Settings
from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Readout
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.numerics.rounding import FORMULA, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem


@dataclass(eq=False)
class DisplacementBound(PreparedBound):
    """``||F(X0 + D) - F(X0)|| <= r ||J|| + |remainder of the readout|`` for ``||D||_F <= r``.

    Args:
        problem: The question; its goal is a displacement.
        preparation: Norms at its clean input, for its movable tokens and its readout.
        factor: ``sup ||D||_F / distance(D)`` of the threat.
    """

    problem: Problem
    preparation: Preparation
    factor: float

    @property
    def failure_probability(self) -> float:
        return self.preparation.failure_probability

    @property
    def first_guess(self) -> float | None:
        slope = self.preparation.first * self.factor
        return 0.5 * self._budget / slope if slope > 0.0 else None

    @property
    def _budget(self) -> float:
        return float(self.problem.resolved.budgets[0])

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share on the threat's set of this radius."""
        reach = radius * self.factor
        rest = self.preparation.recursion(reach).at(self.preparation.readout).total
        used = used_share(self.preparation.first * reach + rest, self._budget, share=FORMULA)
        return Upper(used, self.failure_probability if math.isfinite(used) else 0.0)


def prepared(problem: Problem, movable: torch.Tensor, settings: Settings, readout: Readout) -> Preparation:
    """The preparation of a problem's network at its clean input."""
    network = problem.network
    assert isinstance(network, NetworkGraph)  # noqa: S101 - refused otherwise; narrows the type
    record = network.linearise(problem.clean.points, problem.mass)
    return Preparation(record, Moves(movable, problem.clean.width), readout, settings)


def pooled_readout(problem: Problem) -> Readout:
    """What the goal counts of the output."""
    network, output = problem.network, problem.clean_output
    assert isinstance(network, NetworkGraph)  # noqa: S101 - refused otherwise; narrows the type
    return Readout(network.output, (int(output.shape[-2]), int(output.shape[-1])), problem.resolved.weights)
