"""The proof holds for whatever a search hands over, and the search's shortcuts are near what they stand for."""

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.choice import Choice
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve, rough_quadratic
from attnrobust.certify.margin.all_tokens.majorant import Parameters, initial_parameters
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.all_tokens.proof import proved_drop
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from tests.margin_problems import evaluation_rounding, random_problem
from tests.stress import Draw, boundary_moves


def spoiled(parameters: Parameters, draw: Draw) -> Parameters:
    """Numbers of any sign and size, some of them not finite."""

    def spoil(value: Tensor) -> Tensor:
        wild = value * 10.0 ** (3.0 * draw.normal(*value.shape)) * draw.normal(*value.shape).sign()
        return torch.where(draw.normal(*value.shape) > 1.5, torch.nan, wild).float()

    return Parameters(**{field.name: spoil(getattr(parameters, field.name)) for field in fields(parameters)})


@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall("linf")])
@pytest.mark.parametrize("seed", range(3))
def test_any_choice_bounds_the_drop(seed: int, threat: MoveThreat) -> None:
    problem, draw = random_problem(7000 + seed, threat), Draw(seed)
    bound = MarginBound(problem, seed=0)
    radius = 0.05 * float(problem.clean.points.norm())
    const = bound.constants_at(radius)
    assert const is not None
    moves = boundary_moves(problem, radius, 200, draw)
    drops = problem.resolved.changes(problem.network(problem.clean.points + moves, problem.mass))
    for index, holder in enumerate(bound.functionals):
        scale = draw.normal(*holder.search.scale.shape)  # also negative
        start = draw.normal(1, *bound.rows.points[bound.rows.index].shape)
        choice = Choice(spoiled(initial_parameters(holder.rows), draw), scale, start / 0.0 if seed else start)
        value = proved_drop(holder.rows, threat, const, choice, chance=bound.chance).value
        assert value >= float(drops[:, index].max()) - float(evaluation_rounding(problem))


def test_constants_between_radii_are_near_the_exact_ones() -> None:
    bound = MarginBound(random_problem(7001, FrobeniusBall()), seed=0)
    curve = ConstantsCurve(bound.constants_at, lambda r: bound.constants_at(r, largest=rough_quadratic))
    for radius in (0.10, 0.12):
        exact = curve.known(radius)
        assert exact is not None
        assert curve(radius) is not None
    between, exact = curve(0.11), bound.constants_at(0.11)
    assert between is not None
    assert exact is not None
    assert between.budget.frobenius == pytest.approx(exact.budget.frobenius)
    for name in ("limit", "saturating", "share", "curvature"):
        torch.testing.assert_close(getattr(between, name), getattr(exact, name), rtol=1e-2, atol=1e-12)


def test_constants_of_a_proof_are_never_interpolated() -> None:
    bound = MarginBound(random_problem(7001, FrobeniusBall()), seed=0)
    asked: list[float] = []

    def exact(radius: float) -> None:
        asked.append(radius)

    curve = ConstantsCurve(exact, lambda r: bound.constants_at(r, largest=rough_quadratic))
    assert curve(0.1) is not None
    assert curve(0.12) is not None
    assert curve(0.11) is not None
    assert asked == []
    assert curve.known(0.1) is None
    assert curve.known(0.11) is None
    assert asked == [0.1, 0.11]
    assert math.isfinite(curve.nodes[0.1].budget.frobenius)
