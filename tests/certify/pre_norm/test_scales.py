"""Certificates of hidden states before a norm: never above the attack, and near it."""

from typing import Any

import pytest

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.pre_norm.margin import PreNormMargin
from attnrobust.certify.pre_norm.scales import PreNormScales
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from tests.pre_norm_layers import pre_norm_problem

FEW: Any = AttackBudget(restarts=4, steps=30, rounds=1)
THREATS = (FrobeniusBall(), PerTokenBall(), AnyToken(), FrobeniusBall(tokens=(1,)))


@pytest.mark.parametrize("seed", [3, 5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2, 4, 6, 7))])
def test_scales_stay_below_the_attack(seed: int) -> None:
    problem = pre_norm_problem(seed, THREATS[seed % 4], margin=seed % 3 > 0, small=True)
    certified = PreNormScales().certify(problem)
    assert 0.0 < certified.radius <= attack(problem, budget=FEW).radius


def test_boxes_are_refused() -> None:
    problem = pre_norm_problem(1, PerTokenBall("linf"), margin=True, small=True)
    assert "box" in str(PreNormScales().refuses(problem))
    assert "threats FrobeniusBall" in str(PreNormMargin().refuses(problem))
