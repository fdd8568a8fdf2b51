"""The ellipsoids that hold a set of moves."""

import pytest

from attnrobust.certify.margin.all_tokens.region import ellipsoid
from attnrobust.threats.moves import PerTokenBall
from tests.margin_problems import frobenius, random_problem
from tests.stress import Draw, boundary_moves


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_ellipsoids_hold_the_set(norm: str) -> None:
    problem = random_problem(9, PerTokenBall(norm))  # type: ignore[arg-type]
    moves = boundary_moves(problem, 0.8, 100, Draw(3))
    n, d = problem.clean.points.shape
    scale = Draw(4).normal(n, d if norm == "linf" else 1).abs() + 0.1
    region = ellipsoid(problem.moves, frobenius(problem, 0.8), scale)
    assert region.scale is not None
    assert bool(((moves * region.scale).flatten(1).norm(dim=1) <= region.radius * (1.0 + 1e-9)).all())
