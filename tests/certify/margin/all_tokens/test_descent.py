"""Descent in the majorant's parameters: right slopes, lower bounds, and a guess near the certified radius."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens import majorant
from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.descent import Descent, detached
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve
from attnrobust.certify.margin.all_tokens.majorant import Coefficients
from attnrobust.certify.margin.all_tokens.method import MarginBound, MarginCertificate
from attnrobust.certify.margin.all_tokens.search import _Found
from attnrobust.layers.attention import Attention
from attnrobust.numerics.eigenvalues import spread_eigenvalue, spread_slope
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from tests.margin_problems import random_problem
from tests.stress import Draw


def small_problem(seed: int, *, linf: bool = False) -> Problem:
    return random_problem(7000 + seed, PerTokenBall("linf") if linf else FrobeniusBall())


def constants_of(bound: MarginBound, radius: float) -> Constants:
    """Constants of the largest of this radius, a third of it, a ninth of it, .. where nothing overflows."""
    const = bound.constants_at(radius)
    return const if const is not None else constants_of(bound, radius / 3.0)


def dense_eigenvalue(a: Tensor, w: Tensor, movable: Tensor) -> Tensor:
    spread = (torch.eye(w.shape[-1], dtype=w.dtype) - w[..., None, :]) * movable
    form = torch.einsum("...j,...jk,...jl->...kl", a, spread, spread)
    return torch.linalg.eigvalsh(form)[..., -1]


@pytest.mark.parametrize("seed", range(4))
def test_slope_of_the_spread_eigenvalue(seed: int) -> None:
    draw = Draw(seed)
    w = torch.softmax(2.0 * draw.normal(3, 6), dim=-1)
    movable = torch.ones(6, dtype=torch.float64)
    movable[seed % 3] = 0.0 if seed % 2 else 1.0
    movable *= 0.3 + draw.normal(6).abs() if seed > 1 else 1.0  # lengths
    a = draw.normal(3, 6).abs().requires_grad_(True)
    (expected,) = torch.autograd.grad(dense_eigenvalue(a, w, movable).sum(), a)
    value = spread_eigenvalue(a.detach(), w, movable, bisections=60)
    assert torch.allclose(spread_slope(a.detach(), w, movable, value), expected, atol=1e-3)


@pytest.mark.parametrize("linf", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_slope_of_the_bound_agrees_with_differences(seed: int, linf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten bisections leave 0.3 % of an eigenvalue, which a difference of two large values would feel.
    monkeypatch.setattr(majorant, "spread_eigenvalue", partial(spread_eigenvalue, bisections=60))
    problem = small_problem(seed, linf=linf)
    bound = MarginBound(problem, seed=0)
    holder = bound.functionals[0].search
    holder._raise_precision()
    stage = holder._stage(constants_of(bound, 0.1 * float(problem.clean.points.norm())))
    stage = replace(stage, spread=majorant.exact_spread)
    search = Descent(holder.parameters, holder.scale, steps=1, rate=0.1)

    def evaluated() -> tuple[Coefficients, _Found]:
        found = holder._coefficients(stage, search.parameters())
        at = holder._evaluate(stage, found, detached(search.parameters()), search.scale().detach())
        assert at is not None
        return found, at

    found, at = evaluated()
    holder._saddle(stage, found, search.scale(), at).backward()  # type: ignore[no-untyped-call,unused-ignore]
    step = 3e-2
    for name, raw in (*search.raw.items(), ("scale", search.log_scale)):
        if name == "scale" and not linf:
            continue
        slope = raw.grad
        if name == "gauge":  # a layer without rotary positions has none
            assert slope is None
            continue
        assert slope is not None
        kept, ends = raw.data.clone(), []
        for sign in (1.0, -1.0):
            raw.data = kept + sign * step * slope.sign()
            ends.append(evaluated()[1].solution.value)
        raw.data = kept
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope.abs().sum()), rel=0.1, abs=1e-9), name


@pytest.mark.parametrize("linf", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_descent_lowers_the_bound(seed: int, linf: bool) -> None:
    problem = small_problem(seed, linf=linf)
    bound = MarginBound(problem, seed=0)
    holder = bound.functionals[0].search
    holder._raise_precision()  # what the search itself does where float32 overflows, as here
    stage = holder._stage(constants_of(bound, 0.3 * float(problem.clean.points.norm())))
    assert holder._balance(stage, rounds=5)
    before = stage.value
    assert holder._descend(stage, steps=30, rate=0.06)
    assert stage.value < before * (1.0 - 1e-3)


def test_first_guess_is_near_the_certified_radius() -> None:
    for seed in range(3):
        problem = small_problem(seed)
        guess = MarginCertificate().prepare(problem, seed=0).first_guess
        radius = MarginCertificate().certify(problem, seed=0).radius
        assert guess == pytest.approx(radius, rel=0.05)


def test_a_start_where_constants_overflow_still_finds_a_radius() -> None:
    problem = small_problem(1)
    bound = MarginBound(problem, seed=0)
    holder = bound.functionals[0]

    def below(radius: float) -> Constants | None:
        return bound.constants_at(radius) if radius < 0.2 else None

    radius = holder.choose_parameters(ConstantsCurve(below, below), bound.budgets[0], 5.0, aim=1.0)
    assert 0.0 < radius < 5.0
    assert holder.search.radius is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.one_in(2)
def test_radius_does_not_depend_on_the_gradient_mode_of_the_caller(mode: type) -> None:
    expected = MarginCertificate().certify(small_problem(0), seed=0).radius
    with mode():
        assert MarginCertificate().certify(small_problem(0), seed=0).radius == expected


def test_weights_that_require_gradients_are_fine() -> None:
    problem = small_problem(0)
    layer = problem.network
    assert isinstance(layer, Attention)
    expected = MarginCertificate().certify(problem, seed=0).radius
    traced = replace(layer, w_q=layer.w_q.clone().requires_grad_(True))
    assert MarginCertificate().certify(replace(problem, network=traced), seed=0).radius == expected
