"""The used budget at one radius: first order exactly, curvature as one object, the rest by the recursion."""

import math
from dataclasses import dataclass

import torch

from attnrobust.certify.method import PreparedBound
from attnrobust.certify.network.composite.preparation import Preparation, Settings
from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Readout
from attnrobust.goals import Displacement
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.numerics.rounding import FORMULA, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.tokens import tensor_digest


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
    """The preparation of a problem's network at its clean input.

    The last one for a displacement is kept: it does not depend on the tolerance, nor on which goal asks for it, so the
    next question about the same moves and the same output rows costs a search only. (Margins draw further starts for
    their classes, so that a kept preparation would answer the same question differently the second time.)
    """
    key = _key(problem, movable, settings, readout)
    if key in _KEPT:
        return _KEPT[key]
    network = problem.network
    assert isinstance(network, NetworkGraph)  # noqa: S101 - refused otherwise; narrows the type
    record = network.linearise(problem.clean.points, problem.mass)
    made = Preparation(record, Moves(movable, problem.clean.width), readout, settings)
    if isinstance(problem.goal, Displacement):
        _KEPT.clear()
        _KEPT[key] = made
    return made


_KEPT: dict[str, Preparation] = {}
"""One at most: the sketched features of a network of this size are hundreds of megabytes."""


def _key(problem: Problem, movable: torch.Tensor, settings: Settings, readout: Readout) -> str:
    """Everything that a preparation depends on."""
    states = f"{readout.state};{readout.shape};{settings};{type(problem.goal).__name__};{movable.device}"
    tokens = f"{problem.network.digest};{problem.clean.digest()};{tensor_digest(problem.mass)}"
    return f"{tokens};{tensor_digest(movable, readout.weights)};{states}"


def pooled_readout(problem: Problem) -> Readout:
    """What the goal counts of the output."""
    network, output = problem.network, problem.clean_output
    assert isinstance(network, NetworkGraph)  # noqa: S101 - refused otherwise; narrows the type
    return Readout(network.output, (int(output.shape[-2]), int(output.shape[-1])), problem.resolved.weights)
