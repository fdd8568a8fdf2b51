"""The search does not depend on the last bit: shares that miss 1 by rounding, on either side."""

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.search.stacked_goal import StackedGoal
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most

QUICK = AttackBudget(restarts=12, steps=12, rounds=1)
JUST_REACHED = (1.0 - 2.0**-52, 1.0 - 2.0**-53, 1.0, 1.0 + 2.0**-52, 1.0 + 2.0**-51)


def linear_problem(seed: int, n: int, threat: MoveThreat) -> tuple[Problem, float]:
    """Uniform attention and a margin, with the exact radius."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = Attention(w_q=0 * draw(2, 4, 3), w_k=draw(2, 4, 3), w_v=draw(2, 4, 3), w_o=draw(2, 3, 4))
    problem = Problem(layer, TokenMeasure(draw(n, 4)), threat, Margin(draw(4, 4)))
    pooled = problem.resolved.pooled
    (dense,) = torch.func.jacrev(lambda x: (pooled(layer(x)),))(problem.clean.points)
    gradients = torch.einsum("ce,end->cnd", problem.resolved.functionals, dense)
    return problem, float((problem.resolved.budgets / threat.dual_norm(gradients)).min())


@pytest.mark.parametrize("shown", JUST_REACHED)
@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall()], ids=lambda threat: threat.key)
def test_a_first_order_optimum_is_kept_whichever_way_its_share_rounds(
    shown: float, threat: MoveThreat, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_shares = StackedGoal.shares

    def rounded(self: StackedGoal, output: Tensor) -> Tensor:
        shares = exact_shares(self, output)
        return torch.where((shares - 1.0).abs() <= 1e-14, shown, shares)

    monkeypatch.setattr(StackedGoal, "shares", rounded)
    for seed in range(3):
        for n in (1, 3):
            problem, exact = linear_problem(seed, n, threat)
            assert_at_most(attack(problem, budget=QUICK).radius, exact, rtol=1e-8, what=f"seed {seed}, n {n}")


def test_a_budget_at_the_size_of_the_tokens_rounding_is_attacked() -> None:
    """Adding a tiny move to the tokens rounds it, by more than any share of the budget that a check may forgive."""
    layer = Attention(w_q=torch.zeros(1, 2, 1), w_k=torch.zeros(1, 2, 1), w_v=torch.eye(2)[None])
    problem = Problem(layer, TokenMeasure(torch.full((2, 2), 7.0)), FrobeniusBall(), Displacement(0.1))
    for epsilon in (1e-13, 3e-14, 1e-14):
        result = attack(problem, epsilon=epsilon, budget=QUICK)
        assert result.status is Status.NOT_FOUND
        assert 0.0 < result.radius <= epsilon
