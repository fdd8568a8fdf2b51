"""Handmade adversarial problems that once broke a certificate, or nearly did."""

import math

import pytest
import torch

from attnrobust.certify import method_named
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.eigenvalues import gram_eigenvalue
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat
from attnrobust.tokens import TokenMeasure


def wide_problem(threat: MoveThreat, *, n: int, d: int, k: int, gain: float, budget: float) -> Problem:
    """A layer whose logits reach several hundreds inside moderate balls, at a margin that is far away."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w_q, w_k, w_v = normal(1, d, k) / d**0.5, gain * normal(1, d, k) / d**0.5, normal(1, d, 2) / d**0.5
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([budget, -budget], dtype=torch.float64)
    layer = Attention(w_q=w_q, w_k=w_k, w_v=w_v)
    return Problem(layer, TokenMeasure(normal(n, d)), threat, Margin(weight, bias, label=0))


def test_overflowing_coefficients_are_no_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    value = gram_eigenvalue(rows @ rows.T, torch.full((30,), 1e200, dtype=torch.float64))
    assert float(value) == math.inf


@pytest.mark.parametrize("radius", [36.0, 40.0, 42.5, 45.0, 48.0])
def test_one_token_bound_does_not_vanish_where_constants_overflow(radius: float) -> None:
    problem = wide_problem(FrobeniusBall((1,)), n=4, d=32, k=16, gain=1.0, budget=1.0)
    bound = method_named("margin-one-token").prepare(problem, seed=0)
    delta = torch.zeros_like(problem.clean.points).requires_grad_(True)
    problem.usage(delta).backward()
    assert delta.grad is not None
    move = problem.moves.steepest(delta.grad) * radius
    reached = float(problem.usage(move))
    assert reached > 0.1
    assert bound.usage(radius).value >= reached


@pytest.mark.parametrize("radius", [0.5, 1.0, 3.0, 10.0])
def test_majorant_of_many_tokens_says_infinity_and_not_nan(radius: float) -> None:
    problem = wide_problem(FrobeniusBall(), n=97, d=3, k=2, gain=30.0, budget=100.0)
    bound = method_named("margin-majorant").prepare(problem, seed=0)
    assert bound.usage(radius).value > 0.0
