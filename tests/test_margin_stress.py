"""No attack passes a bound: at a certified radius, and just inside it, ascent never drops a margin by more.

A radius is certified for every budget that is at least the bound there, so one evaluation of the bound per problem
tests the claim exactly where it is tight, without a search.
"""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin import MarginCertificate
from attnrobust.certify.margin_token import MarginTokenCertificate
from attnrobust.goal import Margin, pool_weights
from attnrobust.problem import Problem
from attnrobust.threat import AnyToken, FrobeniusBall, PerTokenBall, Threat
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import Draw, boundary_moves, random_problem

THREATS: tuple[Threat | None, ...] = (
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


def largest_usage(problem: Problem, radius: float, draw: Draw, *, steps: int) -> float:
    """Largest drop over budget that random moves and projected ascent reach at this radius."""
    budgets = problem.resolved.budgets
    move = boundary_moves(problem, radius, 12, draw)
    worst = -math.inf
    for step in range(steps):
        move = move.clone().requires_grad_(True)
        mass = None if problem.mass is None else problem.mass.expand(move.shape[0], -1)
        used = (problem.resolved.changes(problem.network(problem.clean.points + move, mass)) / budgets).amax(-1)
        assert torch.isfinite(used).all()
        worst = max(worst, float(used.detach().max()))
        (slope,) = torch.autograd.grad(used.sum(), move)
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
        rate = radius * problem.clean.points.numel() ** 0.5 * (0.5 - 0.45 * step / steps)
        towards = problem.threat.steepest(slope) * radius if step % 3 == 0 else move.detach() + rate * slope / length
        move = problem.threat.project(towards, radius)
    return worst


def ratios(seed: int, *, steps: int) -> list[tuple[str, float]]:
    """(method, reached / bound) at some radii of one problem; 1 would be a counterexample."""
    draw = Draw(90_000 + seed)
    problem = scaled(random_problem(50_000 + seed, THREATS[seed % len(THREATS)]), SIZES[seed % len(SIZES)])
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    found = []
    for method in (MarginCertificate(), MarginTokenCertificate()):
        if method.refuses(problem) is not None:
            continue
        prepared = method.prepare(problem, seed=seed)
        radius = scale * 10 ** draw.between(-2.0, 0.3)
        bound = prepared.usage(radius).value
        while bound == math.inf and radius > 1e-6 * scale:  # logit changes beyond the exponents
            radius, bound = 0.2 * radius, prepared.usage(0.2 * radius).value
        for share in (1.0, 0.999):
            reached = largest_usage(problem, share * radius, draw, steps=steps)
            found.append((f"{method.name} {problem.threat.key}", reached / (bound + ROUNDING)))
    return found


@pytest.mark.parametrize("seed", range(7))
def test_no_attack_passes_the_bound(seed: int) -> None:
    for name, ratio in ratios(seed, steps=12):
        assert ratio <= 1.0, name


@pytest.mark.slow
@pytest.mark.parametrize("block", range(28))
def test_no_attack_passes_the_bound_on_many_problems(block: int) -> None:
    """1400 problems: python -m pytest -m slow tests/test_margin_stress.py."""
    count: Counter[str] = Counter()
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        for name, ratio in ratios(seed, steps=30):
            assert ratio <= 1.0, (seed, name)
            count[name] += 1
    assert count.total() >= 100
