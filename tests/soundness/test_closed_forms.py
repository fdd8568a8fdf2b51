"""The bounds of docs/certificates-literature.md against sampling and gradient ascent over the threat's whole set."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_smooth import CastinDerived, CastinReported
from attnrobust.certify.closed_form.havens2024_local import HavensLocal
from attnrobust.certify.closed_form.singla2020_curvature import SinglaCurvature
from attnrobust.certify.closed_form.spread_lipschitz import SpreadLipschitz
from attnrobust.certify.method import CertificateMethod
from attnrobust.certify.radius import LARGEST
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.cases import Case, case_named, cases, goals, problems, telling_first, threats
from tests.stress import Draw, largest_usage

METHODS: tuple[CertificateMethod, ...] = (
    CastinReported(),
    CastinDerived(),
    SpreadLipschitz(),
    HavensLocal(),
    SinglaCurvature(),
)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> CertificateMethod:
    chosen = request.param
    assert isinstance(chosen, CertificateMethod)
    return chosen


@pytest.mark.parametrize("case", telling_first(cases()))
def test_above_everything_found_on_the_set(case: Case) -> None:
    """Each method at three sizes, from nearly linear to far outside of it, on every threat and goal."""
    for index, problem in list(enumerate(problems(case)))[case.n % 3 :: 3]:
        prepared = [method.prepare(problem, seed=0) for method in METHODS]
        scale = prepared[-1].first_guess or 1.0
        for size in (0.1 * scale, scale, 10.0 * scale):
            found = largest_usage(problem, size, Draw(index), count=4, steps=16)
            for method, bound in zip(METHODS, prepared, strict=True):
                claimed = bound.usage(size).value
                # A constant layer claims 0 and moves by its own rounding.
                assert found <= claimed + 1e-12, (
                    f"{method.name} on {problem.threat.key}, {problem.goal.key} at {size:g}"
                )


@pytest.mark.slow
def test_above_samples_on_a_thousand_random_problems(method: CertificateMethod) -> None:
    """Random layers, threats and goals; samples at every scale inside the set, boundary included."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for index in range(1000):
        n, d, heads, k, v = pick(1, 9), pick(1, 6), pick(1, 4), pick(1, 4), pick(1, 4)
        size, strength = 10 ** float(draw(1)), 10 ** float(0.7 * draw(1))
        layer = Attention(
            w_q=strength * draw(heads, d, k),
            w_k=draw(heads, d, k),
            w_v=draw(heads, d, v),
            b_q=draw(heads, k) if index % 2 else None,
            w_o=draw(heads, v, 3) if index % 3 else None,
            mask=draw(n, n) if index % 5 == 0 else None,
            causal=index % 4 == 0,
        )
        points = draw(n, d)
        tokens = TokenMeasure(points, torch.softmax(draw(n), 0)) if index % 7 == 0 else TokenMeasure(points)
        case = Case("random", layer, tokens)
        problem = list(problems_of(case))[index % 8]
        delta = problem.moves.project(100.0 * size * draw(24, n, d), size)
        delta = delta * torch.logspace(-2, 0, 24, dtype=torch.float64)[:, None, None]
        found = float(problem.usage(delta).max())
        assert found <= method.prepare(problem, seed=0).usage(size).value * (1 + 1e-12) + 1e-12


def problems_of(case: Case) -> Iterator[Problem]:
    for threat, goal in zip(threats(case), itertools.cycle(goals(case)), strict=False):
        yield Problem(case.attention, case.tokens, threat, goal)


def test_order_of_the_bounds(case: Case) -> None:
    """Each is provably at most the one before it, wherever the docs say so."""
    for problem in list(problems(case))[case.n % 2 :: 2]:
        bounds = {name: BY_NAME[name].prepare(problem, seed=0) for name in BY_NAME}
        for size in (1e-3, 0.3, 5.0):
            usage = {name: bound.usage(size).value for name, bound in bounds.items()}
            if isinstance(problem.threat, FrobeniusBall) and problem.resolved.weights is None:
                assert usage["castin2024-derived"] <= usage["castin2024-reported"]
            assert usage["spread-lipschitz"] <= usage["castin2024-derived"] * (1 + 1e-9)
            assert usage["havens2024-local"] <= usage["spread-lipschitz"] * (1 + 1e-9)


def test_scales_with_the_values(method: CertificateMethod) -> None:
    for name in ("biases", "concatenated", "causal-masses", "padding"):
        case = case_named(name)
        problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
        larger = replace(problem, network=replace(case.attention, w_v=7.0 * case.attention.w_v))
        once, scaled = (method.prepare(p, seed=0).usage(0.3).value for p in (problem, larger))
        assert scaled == pytest.approx(7.0 * once, rel=1e-6)


def test_does_not_depend_on_the_order_of_tokens(method: CertificateMethod) -> None:
    for name in ("biases", "masses", "finite-mask-masses", "padding"):
        case = case_named(name)
        order = torch.randperm(case.n)
        mask = case.attention.mask
        layer = replace(case.attention, mask=None if mask is None else mask[order][:, order])
        shuffled = TokenMeasure(case.tokens.points[order], case.tokens.mass[order])
        for pool in ("all", "mean"):
            goal = Displacement(0.1, pool=pool)
            before = method.prepare(Problem(case.attention, case.tokens, PerTokenBall(), goal), seed=0).usage(0.2).value
            after = method.prepare(Problem(layer, shuffled, PerTokenBall(), goal), seed=0).usage(0.2).value
            assert after == pytest.approx(before, rel=5e-3)  # per-token scalings start from a random vector


def test_output_constants_do_not_matter(method: CertificateMethod) -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
    layer = replace(case.attention, b_v=None, b_o=None, b_k=None)
    plain = replace(problem, network=layer)
    assert method.certify(plain).radius == pytest.approx(method.certify(problem).radius, rel=1e-9)


# ---- exact answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single-token", "single-token-biases"])
@pytest.mark.parametrize("exact", [HavensLocal(), SinglaCurvature()], ids=lambda m: m.name)
def test_one_token_is_linear(name: str, exact: CertificateMethod) -> None:
    case = case_named(name)
    norm = float(torch.linalg.matrix_norm(case.attention.value_output.sum(dim=0), 2))
    for threat in (FrobeniusBall(), PerTokenBall(), AnyToken()):
        certificate = exact.certify(Problem(case.attention, case.tokens, threat, Displacement(0.3)))
        assert certificate.radius == pytest.approx(0.3 / norm, rel=2e-3)
        assert certificate.radius <= 0.3 / norm
        assert certificate.kind is Kind.FLOAT64


@pytest.mark.parametrize("exact", [HavensLocal(), SinglaCurvature()], ids=lambda m: m.name)
def test_uniform_attention_is_linear(exact: CertificateMethod) -> None:
    """W_q = 0: f_i = (sum_j m_j x_j) w_v for every i, with any masses; its norm is sqrt(n) |m|_2 ||w_v||."""
    case = case_named("uniform-w_q-zero-masses")
    norm = float(torch.linalg.matrix_norm(case.attention.value_output.sum(dim=0), 2))
    truth = 0.3 / (math.sqrt(case.n) * float(torch.linalg.vector_norm(case.tokens.mass)) * norm)
    certificate = exact.certify(Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.3)))
    assert certificate.radius == pytest.approx(truth, rel=2e-3)
    assert certificate.radius <= truth


def test_constant_layer_has_no_radius_limit(method: CertificateMethod) -> None:
    case = case_named("constant-w_v-zero")
    assert method.certify(Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))).radius == LARGEST


def test_padding_tokens_cost_nothing_where_nobody_reads_them() -> None:
    """Moving tokens that no query sees changes only their own rows; another row does not move at all."""
    case = case_named("padding")
    goal = Displacement(0.1, pool=0)
    for exact in (SpreadLipschitz(), HavensLocal(), SinglaCurvature()):
        threat = FrobeniusBall(tokens=(case.n - 1,))
        assert exact.certify(Problem(case.attention, case.tokens, threat, goal)).radius == LARGEST


# ---- Lipschitz constants on a ball ---------------------------------------------------------------------------------


def test_other_networks_are_refused_by_name(method: CertificateMethod) -> None:
    class Doubled:
        width = out_width = 4
        digest = "doubled"

        def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
            return 2.0 * x

    problem = Problem(Doubled(), TokenMeasure(torch.ones(2, 4)), FrobeniusBall(), Displacement(0.1))
    reason = method.refuses(problem)
    assert reason is not None
    assert "Doubled" in reason
