"""Constants of L2, cosine, sigmoid and LipschitzNorm attention against ascent, closed forms and the published forms."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify import certify
from attnrobust.certify.closed_form.cosine_lipschitz import CosineLipschitz
from attnrobust.certify.closed_form.cosine_lipschitz import reported_constant as cosine_reported
from attnrobust.certify.closed_form.dasoulas2021_lipschitznorm import (
    LipschitzNormGlobal,
    constant_through_joint,
    joint_constant,
)
from attnrobust.certify.closed_form.kim2021_l2 import KimL2, reported_constant, spread_bound
from attnrobust.certify.closed_form.sigmoid_ball import SigmoidBall
from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_mean_field
from attnrobust.certify.method import CertificateMethod
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.cases import case_named
from tests.stress import Draw, largest_usage

Build = Callable[..., Any]


def _weights(seed: int, heads: int, width: int, *, projected: bool, shared: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"w_q": draw(heads, width, 3), "w_v": draw(heads, width, 2)}
    if not shared:
        found["w_k"] = draw(heads, width, 3)
    if projected:
        found["w_o"] = draw(heads, 2, 4)
    return found


def l2(seed: int, **more: Any) -> L2Attention:
    return L2Attention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=True), **more)


def cosine(seed: int, **more: Any) -> CosineAttention:
    options = {"tau": 1.5, "nu": 0.7, "eps": 0.1} | more
    return CosineAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **options)


def sigmoid(seed: int, **more: Any) -> SigmoidAttention:
    return SigmoidAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **({"shift": -0.4} | more))


def lipschitznorm(seed: int, **more: Any) -> LipschitzNormAttention:
    return LipschitzNormAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **more)


LAYERS: tuple[tuple[Build, CertificateMethod], ...] = (
    (l2, KimL2()),
    (cosine, CosineLipschitz()),
    (sigmoid, SigmoidBall()),
    (lipschitznorm, LipschitzNormGlobal()),
)
pairs = pytest.mark.parametrize(("build", "method"), LAYERS, ids=[method.name for _, method in LAYERS])


def _problem(layer: Any, points: Tensor, threat: MoveThreat, goal: Goal, mass: Tensor | None = None) -> Problem:
    return Problem(layer, TokenMeasure(points) if mass is None else TokenMeasure(points, mass), threat, goal)


@pairs
@pytest.mark.parametrize("seed", range(4))
def test_above_everything_found(build: Build, method: CertificateMethod, seed: int) -> None:
    layer = build(seed)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(5, 3, generator=generator, dtype=torch.float64) * (0.3, 1.0, 4.0, 0.05)[seed]
    masses = None if build is lipschitznorm else torch.softmax(torch.randn(5, generator=generator).double(), 0)
    readout = Margin(weight=torch.randn(3, layer.out_width, generator=generator).double())
    goals: tuple[Goal, ...] = (Displacement(0.1), Displacement(0.1, pool="mean"), Displacement(0.1, pool=2), readout)
    threats: tuple[MoveThreat, ...] = (FrobeniusBall(), PerTokenBall(), PerTokenBall(norm="linf"), AnyToken())
    for index, goal in enumerate(goals):
        for mass in (None, masses):
            problem = _problem(layer, points, threats[(index + seed) % 4], goal, mass)
            bound = method.prepare(problem, seed=0)
            for size in (0.01, 0.3, 3.0):
                assert largest_usage(problem, size, Draw(0), count=4, steps=15) <= bound.usage(size).value


@pairs
def test_far_from_the_origin_and_scaled(build: Build, method: CertificateMethod) -> None:
    """Scaled values scale the bound; a common shift of all tokens does not matter where the constant is global."""
    layer = build(1)
    points = torch.randn(4, 3, dtype=torch.float64)
    goal = Displacement(0.1)
    once = method.certify(_problem(layer, points, FrobeniusBall(), goal)).radius
    if build not in (cosine, lipschitznorm):  # their values are normalised, or enter the scores
        larger = method.certify(_problem(replace(layer, w_v=5.0 * layer.w_v), points, FrobeniusBall(), goal)).radius
        assert larger < once
    if build is not sigmoid:
        shifted = method.certify(_problem(layer, points + 100.0, FrobeniusBall(), goal)).radius
        assert shifted == pytest.approx(once, rel=2e-3)


def test_certify_takes_them() -> None:
    report = certify(_problem(l2(0), torch.randn(4, 3, dtype=torch.float64), FrobeniusBall(), Displacement(0.1)))
    assert [certificate.method for certificate in report.certificates] == ["kim2021-l2"]
    assert report.best is not None
    assert report.best.radius > 0
    reasons = {skipped.method: skipped.reason for skipped in report.skipped}
    assert "L2Attention" in reasons["castin2024-derived"]


@pairs
def test_dot_product_attention_is_refused(build: Build, method: CertificateMethod) -> None:
    case = case_named("biases")
    reason = method.refuses(_problem(case.attention, case.tokens.points, FrobeniusBall(), Displacement(0.1)))
    assert reason is not None
    assert "not Attention" in reason


# ---- L2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odds", [0.0, 1e-9, 1.0, 3.0, 1e3, 1e12])
def test_spread_bound_solves_its_equation(odds: float) -> None:
    c = spread_bound(odds)
    assert c * math.exp(c + 1) == pytest.approx(odds, rel=1e-9, abs=1e-300)
    assert c * math.exp(c + 1) >= odds


def test_spread_bound_is_the_largest_mean_square() -> None:
    for n in (2, 5, 30):
        distances = (5 * torch.rand(20_000, n - 1, dtype=torch.float64)).square()
        weights = torch.exp(-distances)
        mean = (weights * distances).sum(-1) / (1 + weights.sum(-1))
        c = spread_bound(n - 1.0)
        assert float(mean.max()) <= c
        at = torch.full((n - 1,), 1.0 + c, dtype=torch.float64)
        assert float((torch.exp(-at) * at).sum() / (1 + torch.exp(-at).sum())) == pytest.approx(c, rel=1e-9)


def _l2_jacobian(layer: L2Attention, points: Tensor) -> Tensor:
    return torch.func.jacrev(layer)(points).flatten(0, 1).flatten(1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_kims_constants_hold_over_all_of_space(norm: str) -> None:
    """Inputs at every scale, and the configurations where the spread bound is attained."""
    for seed in range(6):
        layer = l2(seed)
        for n in (2, 4, 8):
            bound = reported_constant(layer, n, norm=norm).value
            generator = torch.Generator().manual_seed(seed)
            for scale in (0.0, 0.1, 0.5, 1.0, 3.0, 30.0):
                points = scale * torch.randn(n, 3, generator=generator, dtype=torch.float64)
                points[1:] = points[1:] if seed % 2 else points[1]
                jacobian = _l2_jacobian(layer, points)
                value = torch.linalg.matrix_norm(jacobian, 2 if norm == "l2" else math.inf)
                assert float(value) <= bound


@pytest.mark.parametrize(("n", "most"), [(11, 1.23), (101, 1.15), (1001, 1.1)])
def test_linf_constant_is_asymptotically_tight(n: int, most: float) -> None:
    """Width 1: one token at 0, half of the others at t and half at -t; the first row nearly attains 4c + 1."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    layer = L2Attention(w_q=one, w_v=one, scale=1.0)
    best = 0.0
    for distance in torch.linspace(0.8, 4.0, 60, dtype=torch.float64).tolist():
        points = torch.full((n, 1), distance, dtype=torch.float64)
        points[0], points[1 : (n + 1) // 2] = 0.0, -distance
        points.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(points)[0, 0], points)
        best = max(best, float(gradient.abs().sum()))
    bound = reported_constant(layer, n, norm="linf").value
    assert bound == pytest.approx(4 * spread_bound(n - 1.0) + 1, rel=1e-9)
    assert best <= bound <= most * best


def test_derived_l2_constant_beats_the_reported_one() -> None:
    for seed in range(4):
        layer = l2(seed)
        spread = 1e3 * torch.randn(6, 3, dtype=torch.float64)  # so far apart that the clean diameter does not help
        usage = KimL2().prepare(_problem(layer, spread, FrobeniusBall(), Displacement(1.0)), seed=0).usage(1.0).value
        assert usage <= reported_constant(layer, 6).value * (1 + 1e-9) * math.sqrt(layer.heads)


def test_kim_refusals() -> None:
    with pytest.raises(InputError, match="l2"):
        reported_constant(l2(0), 3, norm="l1")
    with pytest.raises(InputError, match="odds"):
        spread_bound(-1.0)


# ---- cosine, sigmoid, LipschitzNorm --------------------------------------------------------------------------------


def test_cosine_constant_against_the_published_ones() -> None:
    """One head, n = 4, tau = 1, unit weights, eps = 1/4: derived 2 (2 * 2 + 1), published 2 * 28 and 2 * 38."""
    eye = torch.eye(3, dtype=torch.float64)[None]
    layer = CosineAttention(w_q=eye, w_k=eye, w_v=eye, tau=1.0, nu=1.0, eps=0.25)
    problem = _problem(layer, torch.randn(4, 3, dtype=torch.float64), FrobeniusBall(), Displacement(1.0))
    assert CosineLipschitz().prepare(problem, seed=0).usage(1.0).value == pytest.approx(2 * 5.0, rel=1e-9)
    assert cosine_reported(layer, 4).value == pytest.approx(2 * 28.0, rel=1e-9)
    assert cosine_reported(layer, 4, form="lipsformer").value == pytest.approx(2 * 38.0, rel=1e-9)
    with pytest.raises(InputError, match="one head"):
        cosine_reported(cosine(0), 4)
    with pytest.raises(InputError, match="form"):
        cosine_reported(layer, 4, form="printed")


def test_sigmoid_measures() -> None:
    """Local constants of weighted measures in W_2 stay below sigma(a + b) + a/2, and come within a factor 2.5."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for a in (-2.0, 0.5, 2.0):
        layer = SigmoidAttention(w_q=one, w_k=a * one, w_v=one, scale=1.0)
        bound, best = sigmoid_mean_field(layer, 1.0).value, 0.0
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            points = 2 * torch.rand(3, 1, generator=generator, dtype=torch.float64) - 1
            mass = torch.softmax(3 * torch.randn(3, generator=generator, dtype=torch.float64), 0)
            root = mass.sqrt()
            matrix = torch.func.jacrev(lambda x, m=mass, f=layer: f(x, m))(points)[:, 0, :, 0]
            best = max(best, float(torch.linalg.matrix_norm(root[:, None] * matrix / root, 2)))
        assert best <= bound <= 3.0 * best
    with pytest.raises(InputError, match="radius"):
        sigmoid_mean_field(sigmoid(0), -1.0)


@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall()], ids=lambda threat: threat.key)
def test_lipschitznorm_where_values_dominate(threat: MoveThreat) -> None:
    """Tiny queries and keys: the layer averages values, and the bound is (e_n + 1) ||w_v|| with sqrt(n) < e here."""
    generator = torch.Generator().manual_seed(0)
    w_q, w_k, w_v = torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    layer = LipschitzNormAttention(w_q=1e-6 * w_q, w_k=1e-6 * w_k, w_v=w_v)
    points = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    problem = _problem(layer, points, threat, Displacement(1.0))
    found = largest_usage(problem, 0.1, Draw(0), steps=40)
    bound = LipschitzNormGlobal().prepare(problem, seed=0).usage(0.1).value
    assert found <= bound <= 3.6 * found


def test_lipschitznorm_joint_constant() -> None:
    """The derivative in (Q, K, V) at inputs of every proportion of the three norms."""

    def attend(joint: Tensor) -> Tensor:
        queries, keys, values = joint
        u, v, w = (
            torch.linalg.vector_norm(queries),
            *(torch.linalg.vector_norm(m, dim=-1).amax() for m in (keys, values)),
        )
        return torch.softmax(queries @ keys.T / torch.stack([u * v, u * w, v * w]).amax(), -1) @ values

    best, n = 0.0, 5
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        scales = 10 ** torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
        joint = scales * torch.randn(3, n, 2, generator=generator, dtype=torch.float64)
        matrix = torch.func.jacrev(attend)(joint).reshape(n * 2, -1)
        best = max(best, float(torch.linalg.matrix_norm(matrix, 2)))
    derived, reported = joint_constant(n).value, joint_constant(n, form="reported").value
    assert best <= derived <= 4.35 < reported
    assert reported == pytest.approx(10.55, abs=0.01)
    assert derived <= 4.0 * best
    with pytest.raises(InputError, match="form"):
        joint_constant(3, form="printed")


def test_lipschitznorm_constant_through_the_joint_one() -> None:
    """Tokens (q, k, v) carry over with norm 1, equal blocks with sqrt(3); heads side by side are stacked."""
    blocks = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2).permute(1, 0, 2)[:, None]
    joint = joint_constant(4).value
    apart = LipschitzNormAttention(w_q=blocks[0], w_k=blocks[1], w_v=blocks[2])
    assert constant_through_joint(apart, 4).value == pytest.approx(joint, rel=1e-9)
    same = LipschitzNormAttention(w_q=blocks[0], w_k=blocks[0], w_v=blocks[0])
    assert constant_through_joint(same, 4).value == pytest.approx(3**0.5 * joint, rel=1e-9)
    two = LipschitzNormAttention(**{w: torch.cat([blocks[0], blocks[0]]) for w in ("w_q", "w_k", "w_v")})
    assert constant_through_joint(two, 4).value == pytest.approx(6**0.5 * joint, rel=1e-9)
