"""Displacements of hidden states: no move of the ball uses more than the bound, which is near the first order."""

import pytest
import torch

from attnrobust.certify.pre_norm.displacement import PreNormDisplacementBound
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from tests.pre_norm_layers import pre_norm_problem
from tests.stress import Draw

ASCENT_STEPS = 40


def largest_usage(problem: Problem, radius: float, seed: int) -> float:
    """Projected ascent from many starts."""
    delta = 1e9 * Draw(seed).normal(12, *problem.clean.points.shape)
    for step in range(ASCENT_STEPS):
        delta = problem.moves.project(delta, radius).requires_grad_(True)
        (slope,) = torch.autograd.grad(problem.usage(delta).sum(), delta)
        delta = (delta + (1.0 - step / ASCENT_STEPS) * radius * problem.moves.steepest(slope)).detach()
    return float(problem.usage(problem.moves.project(delta, radius)).max())


@pytest.mark.parametrize("seed", range(8))
def test_no_move_uses_more_than_the_bound(seed: int) -> None:
    """Even seeds add the tokens; at small radii the bound is the first order, up to the parts along the tokens."""
    problem = pre_norm_problem(seed, FrobeniusBall(), margin=False, small=True)
    bound = PreNormDisplacementBound(problem, seed=0)
    shortest = float(bound.front.lengths.min())
    for share in (1e-3, 0.2):
        used = largest_usage(problem, share * shortest, seed)
        assert used <= bound.usage(share * shortest).value
    if seed % 2:
        assert bound.usage(1e-3 * shortest).value <= 1.5 * largest_usage(problem, 1e-3 * shortest, seed)
