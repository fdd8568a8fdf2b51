"""One moving token: the bound holds pointwise for every token, capped or not (Theorem 2)."""

import decimal
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.method import MarginCertificate
from attnrobust.certify.margin.one_token.descent import SHARES, SIGNED, named
from attnrobust.certify.margin.one_token.foreign_rows import PROOF_NODES, foreign_constant, foreign_start
from attnrobust.certify.margin.one_token.functional import TokenFunctionalBound
from attnrobust.certify.margin.one_token.logistic import logistic_change, steepest_turn
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate, TokenBound
from attnrobust.certify.margin.one_token.own_row import own_form, own_start
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall, TokenNorm
from tests.margin_problems import random_problem
from tests.stress import Draw

ROUNDING = 1e-9


def any_token(seed: int) -> Problem:
    problem = random_problem(seed)
    return Problem(problem.network, problem.clean, AnyToken(), problem.goal)


def perturbed(draw: Draw, name: str, value: Tensor) -> Tensor:
    """Another legal value of a parameter: references and curves of any sign, positive ones over two decades."""
    if name in SIGNED:
        return value + 10 ** draw.between(-2.0, 0.5) * draw.normal(*value.shape)
    if name in SHARES:
        return (value + 0.4 * draw.normal(*value.shape)).clamp(0.0, 1.0)
    return value * 10 ** (0.5 * draw.normal(*value.shape))


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


def test_both_margin_methods_refuse_each_others_threats() -> None:
    problem = any_token(8)
    assert MarginCertificate().refuses(problem) is not None
    assert MarginTokenCertificate().refuses(problem) is None
    assert MarginTokenCertificate().refuses(random_problem(8, FrobeniusBall())) is not None


@pytest.mark.parametrize("seed", range(12))
def test_own_row_is_the_formula_of_theorem_1(seed: int) -> None:
    """Every term of the own row, evaluated from its definition at random moves and parameters."""
    problem, draw = any_token(seed), Draw(seed)
    bound = TokenBound(problem).functionals[0]
    radius = 0.3 * float(problem.clean.points.norm()) / problem.clean.n**0.5
    found = bound.at_radius(radius, bound.tokens)
    assert found is not None
    group, const, rows = found.group, found.own, bound.functional.rows
    par = named(own_start(torch.ones_like(found.average)), partial(perturbed, draw))
    form = own_form(group, const, par)
    matrix = rows.layer.factor * rows.layer.w_q @ rows.layer.w_k.mT
    moves = draw.normal(problem.clean.n, problem.clean.width)
    for token, delta in enumerate(moves):
        w, v, o = rows.weight[:, token], bound.functional.advantage[:, token], rows.own[:, token]
        raw = rows.alpha @ delta
        raw[:, token] += rows.beta[:, token] @ delta
        x, t = raw - (w * raw).sum(-1, keepdim=True), bound.functional.gamma @ delta
        query = (matrix.mT @ delta).square().sum(-1)
        quadratic = torch.einsum("d,hde,e->h", delta, matrix, delta)
        length, unit = bound.functional.value_norm[:, 0], radius * group.own_gradient_norm[:, token]
        theta, omega, tau = (
            par.value[:, token] * radius * length,
            par.reference[:, token] * unit,
            par.split[:, token] * unit,
        )
        first, same, share = const.slope[:, token], const.slope_same[:, token], const.share[:, token]
        eta = torch.minimum(w[:, token], 0.5 * (same - first).clamp_min(0.0))
        kappa, pair = torch.maximum(first + eta, same - eta), par.pair[:, token] * length
        moved = v.clone()
        moved[:, token] -= theta
        centred = moved - (w * moved).sum(-1, keepdim=True)
        nu = moved + (tau - omega)[:, None]
        curve = torch.where(nu > 0, nu * const.saturating[:, token], nu * const.curvature[:, token])
        curve[:, token] += pair * kappa
        eps = par.bilinear[:, token, None].expand_as(curve)
        eps = torch.where(curve > 0, eps, -eps.clamp_max(1.0))
        rest = curve * (1.0 + 1.0 / eps)
        drop_first = (moved * w * x).sum(-1) - w[:, token] * t
        s1, s2 = par.query_value[:, token] * length, par.query_mean[:, token]
        kept, jump = w[:, token] - eta, o[:, token].abs() * radius
        weighted = w[:, token] * centred[:, token]
        twice = (
            (curve * (1.0 + eps) * x**2).sum(-1) - 2.0 * kept * x[:, token] * t + 2.0 * weighted * quadratic
            + share / (2.0 * tau) * (drop_first - omega) ** 2 + (kappa / pair + kept * jump / s1) * (t - theta) ** 2
            + query * (radius**2 * (rest * o**2).sum(-1) + kept * jump * s1 + share * weighted.abs() * s2)
            + share * weighted.abs() / s2 * delta.square().sum() - 2.0 * eta * theta * x[:, token]
        )  # fmt: skip
        y = torch.einsum("d,hda->ha", delta, group.basis)
        ours = form.constant[:, token] + (form.linear[:, token] * y).sum(-1)
        ours = ours + 0.5 * torch.einsum("ha,hab,hb->h", y, form.core[:, token], y)
        ours = ours + 0.5 * form.identity[:, token] * delta.square().sum()
        size = form.core[:, token].abs().amax((-2, -1)) * y.square().sum(-1) + ours.abs()
        assert float(((ours - 0.5 * twice).abs() / size).amax()) <= 1e-10


def test_logistic_change_keeps_its_digits() -> None:
    draw = Draw(3)
    logit, shift = 40.0 * draw.normal(400), 10 ** (2.0 * draw.normal(400)).clamp(-8.0, 1.5) * draw.normal(400).sign()
    exact = [long_change(float(x), float(a)) for x, a in zip(logit, shift, strict=True)]
    found = logistic_change(logit, shift)
    assert torch.allclose(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0.0)


def long_change(logit: float, shift: float) -> float:
    """``sigma(x + a) - sigma(x)`` with many digits."""
    with decimal.localcontext(prec=120):
        x, a = decimal.Decimal(logit), decimal.Decimal(shift)
        return float(1 / (1 + (-x - a).exp()) - 1 / (1 + (-x).exp()))


def test_steepest_turn() -> None:
    draw = Draw(4)
    logit, limit = 4.0 * draw.normal(300), 10 ** (0.6 * draw.normal(300))
    p = torch.sigmoid(logit[:, None] + limit[:, None] * torch.linspace(-1.0, 1.0, 501, dtype=torch.float64))
    turn = (p * (1.0 - p) * (1.0 - 2.0 * p)).abs().amax(-1)
    assert bool((steepest_turn(logit, limit) >= turn).all())


@pytest.mark.parametrize("seed", range(12))
def test_quadratic_above_a_foreign_row(seed: int) -> None:
    """Theorem 2: no (a, t) of the box lies above it, and some point lies just below it."""
    problem = any_token(seed)
    draw = Draw(seed)
    bound = TokenBound(problem).functionals[0]
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.1, 1.0, 4.0):
        found = bound.at_radius(share * scale, bound.tokens)
        if found is None:
            continue
        rows = found.foreign
        par = named(foreign_start(rows), partial(perturbed, draw))
        constant = foreign_constant(rows, par, nodes=PROOF_NODES) / rows.size
        grid = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)
        a, t = grid[:, None], grid[None, :]
        x, v, reach, lift, size = (
            q[..., None, None] for q in (rows.logit, rows.value, rows.reach, rows.lift, rows.size)
        )
        p, moved = torch.sigmoid(x), torch.sigmoid(x + a * reach)
        row = (logistic_change(x, a * reach) * v - moved * t * lift) / size
        tilt, curve, lean, mixed, spread = (
            q[..., None, None] for q in (par.tilt, par.curve, par.lean, par.mixed, par.spread)
        )
        linear = (p * torch.sigmoid(-x) * v * reach * a - p * lift * t) / size + tilt * a + lean * t
        above = row - linear - 0.5 * curve * a**2 - mixed * a * t - 0.5 * spread * t**2
        largest = above.flatten(-2).amax(-1)
        weight = 1.0 + par.curve.abs() + par.tilt.abs() + par.lean.abs() + par.mixed.abs() + par.spread
        assert float(((largest - constant) / weight).amax()) <= 1e-13
        loose = torch.where(rows.reach < 6.0, (constant - largest) / weight, 0.0)  # beyond, nodes lie far apart
        assert float(loose.amax()) <= 0.01
