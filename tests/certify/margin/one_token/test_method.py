"""One moving token: the bound holds pointwise for every token, capped or not (Theorem 2)."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.method import MarginCertificate
from attnrobust.certify.margin.one_token import functional
from attnrobust.certify.margin.one_token.descent import named
from attnrobust.certify.margin.one_token.functional import TokenFunctionalBound
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate, TokenBound
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall, TokenNorm
from tests.cases import case_named, problems
from tests.margin_problems import any_token, evaluation_rounding, perturbed, random_problem
from tests.stress import Draw

ROUNDING = 1e-9


def majorants(bound: TokenFunctionalBound, radius: float, draw: Draw) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(constant (l,), gradient (l, d), matrix (l, d, d)) for first, chosen and random parameters."""
    found = bound.at_radius(radius, bound.tokens)
    if found is None:
        return []
    first = bound.start_parameters(found)
    bound.refined(radius, bound.tokens)
    chosen = bound.present_parameters(found)
    out = []
    for par in (first, chosen, *(named(chosen, partial(perturbed, draw)) for _ in range(3))):
        matrix, gradient, constant = bound.quadratic_majorant(found, par)
        out.append((constant, gradient, matrix))
    return out


def drop(problem: Problem, index: int, move: Tensor) -> Tensor:
    """Drop of one margin when token l moves by move[:, l], for all l at once."""
    b, n, _ = move.shape
    full = torch.eye(n, dtype=move.dtype)[None, :, :, None] * move[:, :, None, :]
    mass = None if problem.mass is None else problem.mass.expand(b, n, n)
    return problem.resolved.changes(problem.network(problem.clean.points + full, mass))[..., index]


def worst_excess(problem: Problem, radius: float, seed: int, *, steps: int) -> float:
    """Largest relative violation met by gradient ascent on it."""
    worst = -math.inf
    draw = Draw(seed)
    for index, bound in enumerate(TokenBound(problem).functionals):
        for constant, gradient, matrix in majorants(bound, radius, draw):
            move = draw.normal(6, *gradient.shape)
            move = radius * move / move.norm(dim=-1, keepdim=True)
            for step in range(steps):
                move = move.clone().requires_grad_(True)
                value = drop(problem, index, move)
                linear = (gradient * move).sum(-1)
                quadratic = 0.5 * torch.einsum("bld,lde,ble->bl", move, matrix, move)
                over = value - constant - linear - quadratic - evaluation_rounding(problem)
                size = value.abs() + constant.abs() + linear.abs() + quadratic.abs() + 1e-9
                assert torch.isfinite(over).all()
                worst = max(worst, float((over / size).detach().max()))
                (slope,) = torch.autograd.grad((over / move.detach().square().sum(-1)).sum(), move)
                length = slope.norm(dim=-1, keepdim=True).clamp_min(1e-300)
                move = move.detach() + 0.2 * radius * (1.0 - 0.8 * step / steps) * slope / length
                move = move * (radius / move.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    return worst


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.one_in(3)
def test_bound_holds_pointwise(seed: int) -> None:
    problem = any_token(seed)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 2.0):
        assert worst_excess(problem, share * scale, seed, steps=6) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_bound_holds_pointwise_on_many_problems(seed: int) -> None:
    problem = any_token(20_000 + seed)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 2.0, 6.0):
        assert worst_excess(problem, share * scale, seed, steps=20) <= ROUNDING


@pytest.mark.parametrize("seed", [1, 8])
def test_any_token_is_the_worst_token(seed: int) -> None:
    problem = any_token(seed)
    radius = 0.3 * float(problem.clean.points.norm()) / problem.clean.n**0.5
    every = [
        TokenBound(Problem(problem.network, problem.clean, FrobeniusBall((i,)), problem.goal)).usage(radius).value
        for i in range(problem.clean.n)
    ]
    assert TokenBound(problem).usage(radius).value == pytest.approx(max(every), rel=0.02)


def test_norms_of_one_token_are_nested() -> None:
    problem = random_problem(8, FrobeniusBall())
    radius = 0.3 * float(problem.clean.points.norm()) / problem.clean.n**0.5
    norms: list[tuple[TokenNorm, float]] = [("l2", radius), ("l1", radius), ("linf", radius / problem.clean.width**0.5)]
    usage = {
        norm: TokenBound(Problem(problem.network, problem.clean, PerTokenBall(norm, (0,)), problem.goal)).usage(r).value
        for norm, r in norms
    }
    assert usage["l1"] == pytest.approx(usage["l2"], rel=1e-6)
    assert usage["linf"] == pytest.approx(usage["l2"], rel=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(mode: Callable[[], AbstractContextManager[None]]) -> None:
    expected = TokenBound(any_token(8)).usage(0.1).value
    with mode():
        assert TokenBound(any_token(8)).usage(0.1).value == expected


def test_layers_that_require_gradients() -> None:
    problem = any_token(8)
    layer = problem.network
    assert isinstance(layer, Attention)
    expected = TokenBound(problem).usage(0.1).value
    trained = replace(layer, w_q=layer.w_q.clone().requires_grad_(True), w_v=layer.w_v.clone().requires_grad_(True))
    again = Problem(trained, problem.clean, problem.threat, problem.goal)
    assert TokenBound(again).usage(0.1).value == pytest.approx(expected, rel=1e-12)


def test_classes_that_cannot_matter_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst class is what it is with every class refined; the others keep proved bounds below it."""
    monkeypatch.setattr(functional, "STEPS", 6)  # any parameters are sound: few steps tell as much here
    monkeypatch.setattr(functional, "AGAIN_STEPS", 3)
    problem = next(p for p in problems(case_named("equal-tokens")) if not MarginTokenCertificate().refuses(p))
    radius, bound, every = 0.6, TokenBound(problem), TokenBound(problem)
    assert len(bound.budgets) == 3
    for share in (1.0, 0.97):
        usage = bound.usage(share * radius).value
        whole = [f.bound(share * radius) / b for f, b in zip(every.functionals, every.budgets, strict=True)]
        assert usage == pytest.approx(max(whole), rel=1e-9)
        assert max(bound.shares) == pytest.approx(usage, rel=1e-12)
        assert all(kept >= one * (1 - 0.02) for kept, one in zip(bound.shares, whole, strict=True))


def test_a_bound_under_a_floor_stays_a_bound() -> None:
    problem = any_token(8)
    radius = 0.3 * float(problem.clean.points.norm()) / problem.clean.n**0.5
    rough, fine = TokenBound(problem).functionals[0], TokenBound(problem).functionals[0]
    assert math.inf > rough.bound(radius, floor=math.inf) >= fine.bound(radius) > 0.0


def test_both_margin_methods_refuse_each_others_threats() -> None:
    problem = any_token(8)
    assert MarginCertificate().refuses(problem) is not None
    assert MarginTokenCertificate().refuses(problem) is None
    assert MarginTokenCertificate().refuses(random_problem(8, FrobeniusBall())) is not None
