"""The curvature certificate for measures: its second derivative, and exact to first order."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget
from attnrobust.certify.measures.curvature import second_derivative
from attnrobust.comparison import compare
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import FrobeniusBall
from tests.cases import case_named
from tests.measure_problems import (
    Draw,
    one_head,
)

QUICK = AttackBudget(restarts=2, steps=8, rounds=1)


@pytest.mark.parametrize("goal", ["displacement", "margin"])
def test_curvature_closes_the_gap_for_small_tolerances(goal: str) -> None:
    """Mean readout under W_2: exact to first order, so the gap tends to 1."""
    case = case_named("masses")
    made: Goal = Displacement(1e-7, pool="mean")
    if goal == "margin":
        weight = Draw(3)(2, 4)
        output = case.tokens.mass @ case.attention(case.tokens.points, case.tokens.mass)
        logits = weight @ output
        made = Margin(weight, bias=torch.stack([logits[1] - logits[0] + 1e-7, logits[0] * 0]), pool="mean", label=0)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), made)
    longest = float(torch.linalg.vector_norm(case.tokens.points, dim=1).max())
    threat = CouplingBall(2, domain_radius=longest)
    comparison = compare(replace(problem, threat=threat), methods=["measure-curvature"], budget=QUICK)
    assert 1.0 - 1e-6 <= comparison.gap <= 1.02


def test_second_derivative_bound_holds_along_couplings() -> None:
    """``E |d^2/dt^2 Gamma(x_t)|`` by nested differentiation, never above the constant."""
    worst = 0.0
    for seed in range(30):
        draw = Draw(seed)
        layer = one_head((draw(2, 2) * 0.5).tolist(), [[1.0, 0.0], [0.0, 1.0]])
        mass = torch.softmax(draw(4, scale=3.0), dim=0)
        start, end = torch.tanh(draw(4, 2)) / 2**0.5, torch.tanh(draw(4, 2)) / 2**0.5

        def along(
            t: Tensor, start: Tensor = start, end: Tensor = end, layer: Attention = layer, mass: Tensor = mass
        ) -> Tensor:
            return layer(start + t * (end - start), mass)

        first: Callable[[Tensor], Tensor] = torch.func.jacrev(along)
        second = torch.func.jacrev(first)(torch.tensor(draw.uniform(0, 1)).double())
        found = float(mass @ torch.linalg.vector_norm(second, dim=-1))
        bound = float(second_derivative(layer, 1.0)[0]) * float(mass @ (end - start).square().sum(dim=-1))
        worst = max(worst, found / bound)
    assert 0.02 < worst <= 1.0
