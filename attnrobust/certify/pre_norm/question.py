"""The question about the normalised tokens that a question about hidden states leads to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.pre_norm.sphere import NormFront
from attnrobust.goals import Goal, ResolvedGoal
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.problem import Problem
from attnrobust.tokens import TokenMeasure


@dataclass(frozen=True)
class _GivenGoal(Goal):
    """A goal whose budgets were resolved at another output, of which this one is a part.

    Args:
        given: The resolved goal.
        origin: Its digest.
    """

    given: ResolvedGoal
    origin: str

    @property
    def key(self) -> str:
        return "given"

    @property
    def digest(self) -> str:
        return self.origin

    def resolve(self, output: Tensor, mass: Tensor) -> ResolvedGoal:
        return self.given


def layer_of(problem: Problem) -> PreNormAttention:
    """The layer of a problem that a method about such layers did not refuse."""
    assert isinstance(problem.network, PreNormAttention)  # noqa: S101 - declared by the methods; narrows the type
    return problem.network


def front_of(problem: Problem) -> NormFront:
    """The norm at the problem's clean input."""
    movable = problem.moves.movable(problem.clean.n).to(problem.clean.points.device)
    return NormFront(layer_of(problem), problem.clean.points, movable)


def normalised(problem: Problem) -> Problem:
    """The same goal and threat for the attention alone, at the normalised tokens, with the same budgets."""
    layer = layer_of(problem)
    tokens = TokenMeasure(layer.unit(problem.clean.points), problem.clean.mass)
    return Problem(layer.folded, tokens, problem.threat, _GivenGoal(problem.resolved, problem.digest))


def own_slopes(problem: Problem) -> Float[Tensor, "c"]:
    """What the tokens themselves, added to the output, change per unit of the threat: exact, 0 where they are not."""
    goal, layer = problem.resolved, layer_of(problem)
    if not layer.residual:
        return torch.zeros_like(goal.budgets)
    n, d = problem.clean.points.shape
    movable = problem.moves.movable(n).to(goal.budgets)
    if goal.functionals is None:
        # |sum pi_i d_i| <= |pi| |D| and |D| <= factor x distance, over the tokens that may move.
        pooled = 1.0 if goal.weights is None else float(torch.linalg.vector_norm(goal.weights * movable))
        return goal.budgets.new_tensor([pooled * problem.moves.frobenius_factor(n, d)])
    assert goal.weights is not None  # noqa: S101 - margins are about pooled rows; narrows the type
    return problem.moves.dual_norm(goal.weights[:, None] * goal.functionals[:, None, :])
