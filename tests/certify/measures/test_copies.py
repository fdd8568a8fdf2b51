"""Certificates for copies: the closed form of one copy, the worst copies, and copies that move."""

from dataclasses import replace

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack, duplication_effect
from attnrobust.certify import worst_copies
from attnrobust.comparison import compare
from attnrobust.goals import Displacement, Pool
from attnrobust.problem import Problem
from attnrobust.threats.copies import Copies
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close
from tests.cases import case_named
from tests.measure_problems import (
    Draw,
    one_head,
)

QUICK = AttackBudget(restarts=2, steps=8, rounds=1)
FEW = AttackBudget(restarts=1, steps=4, rounds=1)


def test_one_copy_has_a_closed_form() -> None:
    """``|change of row i| = P_ij / (1 + P_ij) |V (x_j - m_i)|`` for one head, and the worst one is found."""
    draw = Draw(0)
    layer = one_head((draw(3, 3) * 0.7).tolist(), draw(3, 3).tolist())
    clean = TokenMeasure(draw(5, 3))
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.7, pool=2))
    weights = layer.weights(clean.points)[0]
    values = layer.values(clean.points)[0]
    size = torch.linalg.vector_norm(values[None] - (weights @ values)[:, None], dim=-1)
    exact = (weights / (1 + weights) * size)[2]  # of every token j, on row 2
    worst = worst_copies(problem, copies=1)
    assert worst.extra.index(1) == int(exact.argmax())
    assert worst.usage == pytest.approx(float(exact.max()) / 0.7, rel=1e-12)
    effect = torch.linalg.vector_norm(duplication_effect(layer, clean.points), dim=-1)
    assert_close(effect[:, 2], exact, rtol=1e-12)


@pytest.mark.parametrize("name", ["masses", "finite-mask", "causal-masses", "plain-h2-n3-d4", "single-token"])
@pytest.mark.parametrize("pool", ["all", "mean", 0])
@pytest.mark.one_in(2)
def test_worst_copies_is_what_inserted_tokens_do(name: str, pool: Pool) -> None:
    """Tokens written several times with their masses, through the attack's own expansion."""
    case = case_named(name)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1, pool=pool))
    worst = worst_copies(problem, copies=2)
    result = attack(replace(problem, threat=Copies(2)), epsilon=1e-12, budget=FEW)
    assert_at_most(result.usage, worst.usage + 1e-9, rtol=1e-9)
    assert worst.usage == pytest.approx(result.usage, rel=0.3, abs=1e-9)  # greedy copies come near the enumeration


def test_copies_that_violate_the_goal_leave_no_radius() -> None:
    problem = Problem(case_named("plain-h2-n3-d4").attention, case_named("plain-h2-n3-d4").tokens, FrobeniusBall(),
                      Displacement(1e-3))  # fmt: skip
    comparison = compare(replace(problem, threat=Copies(1)), budget=QUICK)
    assert worst_copies(problem).usage > 1
    assert comparison.attack.radius == 0.0
    assert comparison.certification.best.radius == 0.0


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        ("padding", FrobeniusBall()),
        ("plain-h2-n3-d4", FrobeniusBall(tokens=(1,))),
        ("plain-h2-n3-d4", PerTokenBall("linf")),
        pytest.param("padding", PerTokenBall(), marks=pytest.mark.slow),
        pytest.param("masses", FrobeniusBall(), marks=pytest.mark.slow),
        pytest.param("plain-h2-n3-d4", PerTokenBall(), marks=pytest.mark.slow),
    ],
)
def test_copies_that_move_stay_outside(name: str, threat: FrobeniusBall | PerTokenBall) -> None:
    case = case_named(name)
    pools: tuple[Pool, ...] = ("all", "mean", 1)
    for pool in pools:
        problem = Problem(case.attention, case.tokens, Copies(1, moves=threat), Displacement(3.0, pool=pool))
        comparison = compare(problem, budget=FEW)
        assert comparison.certification.best.radius > 0
        assert comparison.gap >= 1.0
