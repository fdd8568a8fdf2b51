"""The margin certificate with the norm's derivative inside: below the attack on the whole set, and near it."""

from dataclasses import replace

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.pre_norm.margin import PreNormMargin, PreNormMarginBound
from attnrobust.certify.pre_norm.scales import PreNormScales
from attnrobust.goals import Margin
from attnrobust.threats.moves import FrobeniusBall
from tests.pre_norm_layers import pre_norm_problem
from tests.stress import Draw

ASCENT_STEPS = 40
FEW = AttackBudget(restarts=4, steps=30, rounds=1)


@pytest.mark.parametrize("seed", range(8))
def test_no_move_uses_more_than_the_bound(seed: int) -> None:
    """Projected ascent from many starts, at small and large radii."""
    problem = pre_norm_problem(seed, FrobeniusBall(), margin=True, small=True)
    bound = PreNormMarginBound(problem, seed=0)
    share = (0.01, 0.2, 0.6)[seed % 3]
    radius = share * float(bound.front.lengths.min())
    delta = Draw(seed).normal(12, *problem.clean.points.shape)
    for step in range(ASCENT_STEPS):
        delta = problem.moves.project(delta * 1e9 if step == 0 else delta, radius).requires_grad_(True)
        (slope,) = torch.autograd.grad(problem.usage(delta).sum(), delta)
        delta = (delta + (1.0 - step / ASCENT_STEPS) * radius * problem.moves.steepest(slope)).detach()
    used = float(problem.usage(problem.moves.project(delta, radius)).max())
    assert used <= bound.usage(radius).value


def test_it_is_nearly_exact_for_small_margins() -> None:
    """Where second orders do not matter, nothing is lost: neither the parts along tokens, nor the tokens' own moves."""
    problem = pre_norm_problem(2, FrobeniusBall(), margin=True, small=True)
    goal = problem.goal
    assert isinstance(goal, Margin)
    assert isinstance(goal.bias, torch.Tensor)
    near = goal.bias - torch.tensor([0.999 * float(problem.resolved.budgets[0]), 0.0])
    problem = replace(problem, goal=Margin(weight=goal.weight, bias=near, pool=goal.pool, label=0))
    certified, found = PreNormMargin().certify(problem).radius, attack(problem, budget=FEW).radius
    assert 0.98 * found <= certified <= found
    assert PreNormScales().certify(problem).radius < certified
