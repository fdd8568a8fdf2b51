"""Certificates of L2, cosine, sigmoid and LipschitzNorm attention against ascent over the whole set."""

from dataclasses import replace

import pytest
import torch

from attnrobust.certify import certify
from attnrobust.certify.method import CertificateMethod
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from tests.cases import case_named
from tests.seeded_variants import LAYERS, Build, cosine, l2, lipschitznorm, sigmoid, variant_problem
from tests.stress import Draw, largest_usage

pairs = pytest.mark.parametrize(("build", "method"), LAYERS, ids=[method.name for _, method in LAYERS])


@pairs
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.one_in(2)
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
            problem = variant_problem(layer, points, threats[(index + seed) % 4], goal, mass)
            bound = method.prepare(problem, seed=0)
            for size in (0.01, 0.3, 3.0):
                assert largest_usage(problem, size, Draw(0), count=4, steps=15) <= bound.usage(size).value


@pairs
def test_far_from_the_origin_and_scaled(build: Build, method: CertificateMethod) -> None:
    """Scaled values scale the bound; a common shift of all tokens does not matter where the constant is global."""
    layer = build(1)
    points = torch.randn(4, 3, dtype=torch.float64)
    goal = Displacement(0.1)
    once = method.certify(variant_problem(layer, points, FrobeniusBall(), goal)).radius
    if build not in (cosine, lipschitznorm):  # their values are normalised, or enter the scores
        larger = method.certify(
            variant_problem(replace(layer, w_v=5.0 * layer.w_v), points, FrobeniusBall(), goal)
        ).radius
        assert larger < once
    if build is not sigmoid:
        shifted = method.certify(variant_problem(layer, points + 100.0, FrobeniusBall(), goal)).radius
        assert shifted == pytest.approx(once, rel=2e-3)


def test_certify_takes_them() -> None:
    report = certify(variant_problem(l2(0), torch.randn(4, 3, dtype=torch.float64), FrobeniusBall(), Displacement(0.1)))
    assert [certificate.method for certificate in report.certificates] == ["kim2021-l2"]
    assert report.best is not None
    assert report.best.radius > 0
    reasons = {skipped.method: skipped.reason for skipped in report.skipped}
    assert "L2Attention" in reasons["castin2024-derived"]


@pairs
def test_dot_product_attention_is_refused(build: Build, method: CertificateMethod) -> None:
    case = case_named("biases")
    reason = method.refuses(variant_problem(case.attention, case.tokens.points, FrobeniusBall(), Displacement(0.1)))
    assert reason is not None
    assert "not Attention" in reason
