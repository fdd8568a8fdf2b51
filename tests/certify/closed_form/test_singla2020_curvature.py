"""The curvature certificate solves its quadratic."""

import math

import pytest
import torch

from attnrobust.certify.closed_form.singla2020_curvature import SinglaCurvature
from attnrobust.goals import Displacement
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import pool_rows
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from tests.cases import case_named


def test_curvature_radius_is_the_root_of_the_quadratic() -> None:
    """Where the constants do not grow with the size, the search finds (sqrt(L^2 + 2 K t) - L) / K."""
    case = case_named("plain-h1-n5-d4")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(1e-4))
    bound = SinglaCurvature().prepare(problem, seed=0)
    jacobian = AttentionJacobian(case.attention, case.tokens.points).linear_map()
    slope = float(torch.linalg.matrix_norm(pool_rows(jacobian, None).dense(), 2))
    curvature = 2 * (bound.usage(1e-5).value * 1e-4 - slope * 1e-5) / 1e-10
    expected = (math.sqrt(slope**2 + 2 * curvature * 1e-4) - slope) / curvature
    assert SinglaCurvature().certify(problem).radius == pytest.approx(expected, rel=2e-3)
