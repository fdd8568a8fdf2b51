"""No attack passes a bound: at a certified radius, and just inside it, ascent never drops a margin by more.

A radius is certified for every budget that is at least the bound there, so one evaluation of the bound per problem
tests the claim exactly where it is tight, without a search.
"""

import pytest
from torch import Tensor

from attnrobust.certify.margin.all_tokens.method import MarginCertificate
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate
from attnrobust.goals import Margin, pool_weights
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import random_problem
from tests.stress import Draw, Tally, finite_bound, largest_usage

THREATS: tuple[MoveThreat | None, ...] = (
    None,
    FrobeniusBall(tokens=(0, 2)),
    FrobeniusBall(tokens=(1,)),
    PerTokenBall("l2"),
    PerTokenBall("linf"),
    PerTokenBall("l1", tokens=(1, 2, 3)),
    AnyToken(),
)
ROUNDING = 1e-9  # share of the largest number in a comparison: sums of a few thousand products
SIZES = (1.0, 1.0, 1.0, 1e3, 1e-3)  # factors of the tokens: saturated rows, rows that are almost uniform


def scaled(problem: Problem, factor: float) -> Problem:
    """The same layer and margins at tokens of another size."""
    if factor == 1.0:
        return problem
    goal = problem.goal
    assert isinstance(goal, Margin)
    clean = TokenMeasure(factor * problem.clean.points, problem.clean.mass)
    weights = pool_weights(goal.pool, clean.mass)
    assert weights is not None
    assert isinstance(goal.bias, Tensor)
    change = weights @ (
        problem.network(problem.clean.points, problem.mass) - problem.network(clean.points, problem.mass)
    )
    moved = Margin(weight=goal.weight, bias=goal.bias + goal.weight @ change, pool=goal.pool, label=0)
    return Problem(problem.network, clean, problem.threat, moved)


def attack_bounds(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over bound, by method and threat, at a radius of one problem."""
    draw = Draw(
        90_000 + seed
    )  # layer, threat and size are drawn apart: every kind of layer meets every threat and size
    problem = random_problem(draw.integer(0, 2**31), THREATS[seed % len(THREATS)])
    problem = scaled(problem, SIZES[draw.integer(0, len(SIZES) - 1)])
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for method in (MarginCertificate(), MarginTokenCertificate()):
        if method.refuses(problem) is not None:
            continue
        prepared = method.prepare(problem, seed=seed)
        radius, bound = finite_bound(prepared, scale * 10 ** draw.between(-2.0, 0.3), smallest=1e-6 * scale)
        for share in (1.0, 0.999):
            reached = largest_usage(problem, share * radius, draw, steps=steps)
            tally.add(f"{method.name} {problem.threat.key}", reached / (bound + ROUNDING), seed=seed)


@pytest.mark.parametrize("seed", range(7))
def test_no_attack_passes_the_bound(seed: int, tally: Tally) -> None:
    attack_bounds(seed, tally, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(28))
def test_no_attack_passes_the_bound_on_many_problems(block: int, tally: Tally) -> None:
    """1400 problems: python -m pytest -n0 -s -m slow tests/soundness/test_margin_stress.py."""
    before = tally.attacks.total()
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        attack_bounds(seed, tally, steps=30)
    assert tally.attacks.total() - before >= 100
