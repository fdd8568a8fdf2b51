"""The answers of the generated problems, checked: nothing inside the radius violates, something on it does."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnrobust.problem import Problem
from tests.assertions import assert_at_most, assert_close
from tests.strategies import Affine, Hopeless, affine_problems, hopeless_problems


def starts(problem: Problem, size: float, count: int, seed: int) -> Tensor:
    """Random points on the boundary of the threat's set."""
    noise = torch.randn(count, *problem.clean.points.shape, generator=torch.Generator().manual_seed(seed)).double()
    return problem.moves.project(noise * size * 1e6, size)


@given(affine_problems(), st.integers(0, 1000))
def test_nothing_inside_the_radius_violates(drawn: Affine, seed: int) -> None:
    exact = drawn.build()
    delta = starts(exact.problem, min(exact.radius, 1e3), 40, seed)
    # 1e-9: the clean output is of size 10 and is subtracted from outputs that differ by the tolerance, 1e-3 or more
    assert_at_most(float(exact.problem.usage(delta).max()), 1.0, rtol=1e-9, what=repr(exact))


@given(affine_problems())
def test_something_on_the_radius_violates(drawn: Affine) -> None:
    """Each step goes to a maximiser of the linearised share: the power method, since the output is affine."""
    exact = drawn.build()
    problem = exact.problem
    if math.isinf(exact.radius):
        return
    best = torch.zeros((), dtype=torch.float64)
    delta = starts(problem, exact.radius, 40, 0)
    for _ in range(60):
        delta = delta.detach().requires_grad_()
        usage = problem.usage(delta)
        best = torch.maximum(best, usage.detach().max())
        (gradient,) = torch.autograd.grad(usage.sum(), delta)
        delta = exact.radius * problem.moves.steepest(gradient)
    # 1e-3: the power method is slow where the two largest singular values are close
    assert_close(best, torch.ones((), dtype=torch.float64), rtol=1e-3, what=repr(exact))


@given(hopeless_problems(), st.integers(0, 1000))
def test_nothing_violates_the_hopeless(drawn: Hopeless, seed: int) -> None:
    exact = drawn.build()
    for size in (1.0, 1e6):
        usage = float(exact.problem.usage(starts(exact.problem, size, 20, seed)).max())
        assert_at_most(usage, 1e-6, what=repr(exact))
