"""The conic program: repaired multipliers, affine functions, moments, and the bound that they prove."""

import math

import numpy as np
import pytest
import torch

from attnrobust.certify.conic.margin_program import moves_of
from attnrobust.certify.conic.program import Affine, Box, Cone, ConicProgram, MomentMatrix, in_dual_cone, repaired_bound
from attnrobust.certify.conic.row import move_set
from tests.conic_points import THREATS


def test_multipliers_are_moved_into_the_dual_cones() -> None:
    draw = np.random.default_rng(4)
    y = draw.normal(size=300) * np.exp(draw.normal(size=300) * 2)
    x, height = draw.normal(size=5000) * 3, draw.exponential(size=5000)
    scale = draw.exponential(size=5000)
    exponential = np.stack([x * scale, scale, scale * (np.exp(x) + height * (draw.random(5000) < 0.5))], axis=1)
    vectors = draw.normal(size=(5000, 2))
    second = np.column_stack([np.linalg.norm(vectors, axis=1) + height * (draw.random(5000) < 0.5), vectors])
    for cone, members in ((Cone.EXPONENTIAL, exponential), (Cone.SECOND_ORDER, second)):
        fixed = in_dual_cone(cone, y).reshape(-1, 3)
        products = members @ fixed.T
        assert (products >= -1e-12 * (np.abs(members) @ np.abs(fixed).T)).all()
        np.testing.assert_allclose(in_dual_cone(cone, fixed.ravel()).reshape(-1, 3), fixed, rtol=1e-11)
    assert (in_dual_cone(Cone.NONNEGATIVE, y) >= 0).all()
    np.testing.assert_array_equal(in_dual_cone(Cone.ZERO, y), y)


def test_tangents_of_the_exponential_keep_their_direction() -> None:
    # The multiplier of the tangent at a is (-e^a, -e^a (1 - a), 1); it is in the dual cone already.
    for a in (-20.0, -1.0, 0.0, 2.0):
        tangent = np.array([-math.exp(a), -math.exp(a) * (1 - a), 1.0])
        np.testing.assert_allclose(in_dual_cone(Cone.EXPONENTIAL, tangent), tangent, rtol=1e-12)
        low = tangent * [1, 1, 0.5]
        np.testing.assert_allclose(in_dual_cone(Cone.EXPONENTIAL, low), tangent, rtol=1e-12)


def test_without_rows_the_bound_is_the_exact_minimum_over_the_domains() -> None:
    draw = np.random.default_rng(5)
    for threat in THREATS:
        reach = move_set(threat, 4, 3, 0.7)
        moving = int(threat.movable(4).sum())
        moves = moves_of(np.arange(moving * 3).reshape(moving, 3), reach)
        block = MomentMatrix(moving * 3 + np.arange(6), 3, 2.0)
        box = Box(moving * 3 + 6 + np.arange(2), np.array([-1.0, 0.0]), np.array([2.0, 3.0]))
        cost = draw.normal(size=moving * 3 + 8)
        program = ConicProgram(cost, 0.25, (), (box,), (block,), moves, np.ones(len(cost)))
        full = torch.zeros(4, 3, dtype=torch.float64)
        full[threat.movable(4)] = torch.tensor(cost[moves.index])
        farthest = -0.7 * float(threat.dual_norm(full)) / reach.token
        a, b = cost[box.index]
        lowest = min(-a, 2 * a) + min(0.0, 3 * b)
        smallest = float(np.linalg.eigvalsh(block.matrix(cost[block.index]))[0])
        exact = 0.25 + farthest + lowest + 2.0 * min(0.0, smallest)
        assert repaired_bound(program, []) <= exact
        assert repaired_bound(program, []) == pytest.approx(exact, abs=1e-10)


def test_moment_entries_and_their_gradient_matrix_agree() -> None:
    draw = np.random.default_rng(6)
    block, gradient, vector = MomentMatrix(np.arange(10), 4, 1.0), draw.normal(size=10), draw.normal(size=4)
    entries = np.outer(vector, vector)[np.triu_indices(4)]
    assert float(entries @ gradient) == pytest.approx(float(vector @ block.matrix(gradient) @ vector))


def test_affine_functions_add_scale_and_map() -> None:
    f = Affine(np.array([[1.0, 2.0], [0.0, -1.0]]), np.array([3.0, 0.5]))
    x = np.array([2.0, -1.0])
    np.testing.assert_allclose((1.0 - f * np.array([2.0, 4.0])).values(x), 1.0 - np.array([2.0, 4.0]) * f.values(x))
    np.testing.assert_allclose((np.array([1.0, 2.0]) - f).values(x), np.array([1.0, 2.0]) - f.values(x))
    np.testing.assert_allclose(f.total(np.array([1.0, -1.0])).values(x), [f.values(x)[0] - f.values(x)[1]])
    np.testing.assert_allclose((f + f - f).values(x), f.values(x))
