"""The quadratic majorant holds pointwise: gradient ascent on its violation finds none (Theorem 1)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin import MarginBound
from attnrobust.certify.margin_constants import Budget, constants
from attnrobust.certify.margin_form import Majorant
from attnrobust.certify.margin_majorant import balanced, initial_parameters, majorant, pieces
from attnrobust.problem import Problem
from attnrobust.threat import FrobeniusBall, PerTokenBall, Threat
from tests.margin_problems import Draw, boundary_moves, random_problem

ROUNDING = 1e-9  # share of the compared terms; they are sums of a few thousand products


def majorants(problem: Problem, radius: float, seed: int) -> list[tuple[int, Majorant]]:
    """The majorant of every class, with initial parameters, balanced ones and random references."""
    bound = MarginBound(problem, seed=0)
    n, d = problem.clean.points.shape
    threat = problem.threat
    budget = Budget(radius * threat.frobenius_factor(n, d), radius * threat.token_factor(n, d), radius)
    const = constants(bound.rows, bound.geometry, budget)
    if float(const.limit.max()) > 600.0:
        return []
    found = []
    for index, holder in enumerate(bound.classes):
        cls = holder.rows
        piece = pieces(cls, const, cls.first_norm)
        start = initial_parameters(cls)
        moved = balanced(cls, const, piece, start, boundary_moves(problem, radius, 3, Draw(seed)))
        draw = Draw(seed + 7)  # references may have any sign
        random = replace(
            moved, reference=draw.normal(*moved.reference.shape), value=0.5 * draw.normal(*moved.value.shape)
        )
        found += [(index, majorant(cls, const, piece, par)) for par in (start, moved, random)]
    return found


def excess(problem: Problem, index: int, form: Majorant, move: Tensor) -> tuple[Tensor, Tensor]:
    """(drop - majorant, size of the compared terms) for a batch of moves."""
    drop = problem.resolved.changes(problem.network(problem.clean.points + move, problem.mass))[..., index]
    linear = (form.gradient * move).sum((-1, -2))
    quadratic = 0.5 * (move * form.apply(move)).sum((-1, -2))
    size = drop.abs() + linear.abs() + quadratic.abs() + form.constant
    return drop - form.constant - linear - quadratic, size + 1e-9


def worst_excess(problem: Problem, radius: float, seed: int, *, steps: int) -> float:
    """Largest relative violation met on the way of the ascent."""
    worst = -math.inf
    for index, form in majorants(problem, radius, seed):
        move = boundary_moves(problem, radius, 8, Draw(seed + 1))
        for step in range(steps):
            move = move.clone().requires_grad_(True)
            over, size = excess(problem, index, form, move)
            assert torch.isfinite(over).all()
            assert torch.isfinite(form.square).all()
            worst = max(worst, float((over / size).detach().max()))
            (gradient,) = torch.autograd.grad((over / move.detach().square().sum((-1, -2))).sum(), move)
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
            rate = 0.2 * radius * (1.0 - 0.8 * step / steps)
            move = problem.threat.project(move.detach() + rate * gradient / length, radius)
    return worst


THREATS: dict[str, Threat | None] = {
    "frobenius": None,
    "subset": FrobeniusBall(tokens=(0, 2)),
    "one token": FrobeniusBall(tokens=(1,)),
    "per token": PerTokenBall("l2"),
    "linf": PerTokenBall("linf"),
    "l1": PerTokenBall("l1", tokens=(1, 2, 3)),
}


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("seed", range(6))
def test_majorant_holds_pointwise(name: str, seed: int) -> None:
    problem = random_problem(100 * list(THREATS).index(name) + seed, THREATS[name])
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 1.5):
        assert worst_excess(problem, share * scale, seed, steps=10) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_majorant_holds_pointwise_on_many_problems(seed: int) -> None:
    problem = random_problem(10_000 + seed)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 1.5):
        assert worst_excess(problem, share * scale, seed, steps=25) <= ROUNDING
