"""Saddles: points that the first order takes for the nearest violation."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.search.curvature import top_curvature
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close

SMALL = AttackBudget(restarts=3, steps=15, rounds=2)


@dataclass(frozen=True)
class Bowl:
    """One token (x, y) to the scores ``(1 - x - bend y^2 / 2, 0)``; to first order the nearest violation is (1, 0)."""

    bend: float
    width: int = 2
    out_width: int = 2
    digest: str = "bowl"

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        score = 1.0 - x[..., :1] - 0.5 * self.bend * x[..., 1:] ** 2
        return torch.cat([score, torch.zeros_like(score)], dim=-1)


def bowl(bend: float) -> Problem:
    readout = Margin(torch.eye(2, dtype=torch.float64), label=0)
    return Problem(Bowl(bend), TokenMeasure(torch.zeros(1, 2, dtype=torch.float64)), FrobeniusBall(), readout)


@pytest.mark.parametrize("bend", [0.5, 1.5])
def test_the_excess_is_the_eigenvalue_over_the_multiplier(bend: float) -> None:
    evaluator = Evaluator([bowl(bend)], memory_bytes=1 << 20)
    point, target = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        found = top_curvature(evaluator, point, target, evaluator.movable, [torch.Generator().manual_seed(0)])
    assert_close(found.excess, torch.tensor([bend], dtype=torch.float64), rtol=1e-6)
    assert_close(found.direction.abs(), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_a_saddle_is_left(epsilon: float | None) -> None:
    """``1 - x - 2 y^2``: the first row starts and stays at (1, 0); nearest is x = 1/4, |z|^2 = 7/16."""
    result = attack(bowl(4.0), epsilon=epsilon, budget=AttackBudget(restarts=1, steps=30, rounds=2))
    if epsilon is None:
        assert_at_most(result.radius, (7.0 / 16.0) ** 0.5 * 1.001)
    else:
        assert_at_most(2.125 * 0.999, result.usage)  # at x = 1/4 on the unit circle


def test_equal_tokens_are_no_trap() -> None:
    """Along the first-order optimum of equal tokens attention is linear; it bends where they move apart."""
    generator = torch.Generator().manual_seed(21)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = Attention(draw(1, 4, 3) / 2, draw(1, 4, 3) / 2, draw(1, 4, 3) / 2, w_o=draw(1, 3, 4) / 1.7)
    clean = TokenMeasure(draw(1, 4).expand(3, 4))
    problem = Problem(layer, clean, FrobeniusBall(), Margin(draw(3, 4)))
    found = attack(problem, budget=SMALL).radius
    long = attack(problem, budget=AttackBudget(restarts=30, steps=120)).radius
    assert_at_most(found, long * 1.01)
