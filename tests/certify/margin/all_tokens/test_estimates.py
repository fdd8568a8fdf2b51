"""The shortcuts of a search are near what they stand for."""

import math
from dataclasses import replace

import pytest
import torch

from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve, RunningSpread, rough_quadratic
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.numerics.eigenvalues import spread_eigenvalue
from attnrobust.threats.moves import FrobeniusBall
from tests.margin_problems import random_problem
from tests.stress import Draw


@pytest.mark.parametrize("reach", [None, 0.3])
def test_power_steps_reach_the_spread_eigenvalue(reach: float | None) -> None:
    rows, draw = MarginBound(random_problem(7001, FrobeniusBall()), seed=0).rows, Draw(0)
    if reach is not None:
        rows = replace(rows, lengths=reach + draw.normal(rows.n).abs().clamp_max(1.0 - reach))
    coefficient, running = draw.normal(*rows.weight.shape).abs(), RunningSpread()
    found = [running(rows, coefficient) for _ in range(60)][-1]
    exact = spread_eigenvalue(coefficient, rows.weight, rows.reach, bisections=40)
    assert bool((found <= exact * (1.0 + 1e-9)).all())
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0.0)


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
