"""One moving token: the bound holds pointwise for every token, capped or not (Theorem 2)."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin import MarginCertificate
from attnrobust.certify.margin_token import MarginTokenCertificate, TokenBound
from attnrobust.certify.margin_token_class import TokenClassBound, TokenParameters
from attnrobust.problem import Problem
from attnrobust.threat import AnyToken, FrobeniusBall, PerTokenBall
from tests.margin_problems import random_problem
from tests.stress import Draw

ROUNDING = 1e-9


def any_token(seed: int) -> Problem:
    problem = random_problem(seed)
    return Problem(problem.network, problem.clean, AnyToken(), problem.goal)


def majorants(bound: TokenClassBound, radius: float, draw: Draw) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(constant (l,), gradient (l, d), matrix (l, d, d)) for shares 0, 0.5, 1 and balanced parameters."""
    found = bound._set(radius, bound.tokens)
    if found is None:
        return []
    out = []
    par: TokenParameters = bound.parameters
    for share in (0.0, 0.5, 1.0):
        foreign, row, identity, cap, change, constant = bound._parts(found, par)
        core = foreign + (1.0 - share) * row + share * cap
        matrix = bound._dense(found.group, core, (1.0 - share) * identity)
        out.append((share * constant, bound.gradient + share * change, matrix))
        moves = draw.normal(3, *bound.gradient.shape)
        par = bound._balanced(found, par, radius * moves / moves.norm(dim=-1, keepdim=True))
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
    for index, bound in enumerate(TokenBound(problem).classes):
        for constant, gradient, matrix in majorants(bound, radius, draw):
            move = draw.normal(6, *gradient.shape)
            move = radius * move / move.norm(dim=-1, keepdim=True)
            for step in range(steps):
                move = move.clone().requires_grad_(True)
                value = drop(problem, index, move)
                linear = (gradient * move).sum(-1)
                quadratic = 0.5 * torch.einsum("bld,lde,ble->bl", move, matrix, move)
                over = value - constant - linear - quadratic
                size = value.abs() + constant.abs() + linear.abs() + quadratic.abs() + 1e-9
                assert torch.isfinite(over).all()
                worst = max(worst, float((over / size).detach().max()))
                (slope,) = torch.autograd.grad((over / move.detach().square().sum(-1)).sum(), move)
                length = slope.norm(dim=-1, keepdim=True).clamp_min(1e-300)
                move = move.detach() + 0.2 * radius * (1.0 - 0.8 * step / steps) * slope / length
                move = move * (radius / move.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    return worst


@pytest.mark.parametrize("seed", range(10))
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
    method = MarginTokenCertificate()
    every = [
        method.certify(Problem(problem.network, problem.clean, FrobeniusBall((i,)), problem.goal)).radius
        for i in range(problem.clean.n)
    ]
    assert method.certify(problem).radius == pytest.approx(min(every), rel=0.05)


def test_norms_of_one_token_are_nested() -> None:
    problem = random_problem(8, FrobeniusBall())
    method = MarginTokenCertificate()
    radius = {
        norm: method.certify(Problem(problem.network, problem.clean, PerTokenBall(norm, (0,)), problem.goal)).radius
        for norm in ("l2", "linf", "l1")
    }
    assert radius["l1"] == pytest.approx(radius["l2"], rel=1e-2)
    assert radius["linf"] == pytest.approx(radius["l2"] / problem.clean.width**0.5, rel=1e-2)


def test_both_margin_methods_refuse_each_others_threats() -> None:
    problem = any_token(8)
    assert MarginCertificate().refuses(problem) is not None
    assert MarginTokenCertificate().refuses(problem) is None
    assert MarginTokenCertificate().refuses(random_problem(8, FrobeniusBall())) is not None
