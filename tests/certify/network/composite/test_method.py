"""The certificate by its name: what it answers, what it refuses, and attacks between radius and truth."""

import math
from typing import Any

import pytest
import torch

import attnrobust as ar
from attnrobust.certify.network.composite.cost import estimated
from attnrobust.certify.network.composite.method import NetworkComposite, NetworkCompositeLarge
from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.goals import parse_tolerance
from attnrobust.layers.graph import Affine, NetworkGraph, Step
from attnrobust.results import Kind
from attnrobust.threats.parse import parse_threat
from tests.layers.graph.networks import D, network, random

METHOD = NetworkComposite()


def question(goal: Any = "2%", threat: Any = "frobenius", *, head: str = "none", order: str = "pre") -> ar.Problem:
    torch.manual_seed(3)
    goal = parse_tolerance(goal) if isinstance(goal, str) else goal
    return ar.Problem(network(order, 1, "gelu", head=head), ar.TokenMeasure(random(3, D)), parse_threat(threat), goal)


def margin() -> ar.Margin:
    return ar.Margin(torch.eye(3, dtype=torch.float64), pool=0)


@pytest.mark.parametrize("threat", ["frobenius", "token:1", "any-token", "per-token", "per-token-linf"])
def test_radii_are_below_attacks(threat: str) -> None:
    problem = question(threat=threat)
    certificate = METHOD.certify(problem, seed=0)
    attack = ar.attack(problem)
    assert 0.0 < certificate.radius < attack.radius
    if threat in ("frobenius", "token:1", "any-token"):
        assert attack.radius < 1.5 * certificate.radius  # the bound is near at small tolerances


def test_margins_are_below_attacks_and_near_where_curvature_is_small() -> None:
    problem = question(margin(), head="mean")
    certificate = METHOD.certify(problem, seed=0)
    attack = ar.attack(problem)
    assert 0.0 < certificate.radius < attack.radius


def test_small_budgets_lose_nothing() -> None:
    problem = question("0.001%")
    radius = METHOD.certify(problem, seed=0).radius
    record = problem.network.linearise(problem.clean.points)  # type: ignore[attr-defined]
    slope = float(torch.linalg.matrix_norm(record.linear_map().dense(), 2))
    assert radius == pytest.approx(float(problem.resolved.budgets[0]) / slope, rel=5e-3)


def test_one_preparation_serves_every_tolerance() -> None:
    """And another input, readout or seed has its own; the answer is that of a preparation of its own."""
    bounds = [METHOD.prepare(question(goal), seed=seed) for goal, seed in (("1%", 0), ("10%", 0), ("10%", 1))]
    one, two, other = (bound.preparation for bound in bounds)  # type: ignore[attr-defined]
    assert one is two
    assert two is not other
    row = METHOD.prepare(question(ar.Displacement(0.05, pool=1)), seed=1)
    assert row.preparation is not other  # type: ignore[attr-defined]
    kept = bounds[1].usage(0.01).value
    assert kept == METHOD.prepare(question("10%"), seed=0).usage(0.01).value


def test_rows_and_means_of_the_output() -> None:
    whole = METHOD.certify(question(ar.Displacement(0.05)), seed=0).radius
    row = METHOD.certify(question(ar.Displacement(0.05, pool=1)), seed=0).radius
    assert whole < row  # one row moves less than all


def test_deterministic_where_small() -> None:
    certificate = METHOD.certify(question(), seed=0)
    assert (certificate.kind, certificate.failure_probability) == (Kind.FLOAT64, 0.0)


def test_probabilistic_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches and starts are used, cost little here, and stay within the ledger."""
    from attnrobust.certify.network.composite import preparation, top_eigenvalue

    exact = METHOD.certify(question(), seed=0).radius
    monkeypatch.setattr(preparation, "BASIS_LIMIT", 1)
    monkeypatch.setattr(preparation, "PAIR_LIMIT", 1)
    monkeypatch.setattr(top_eigenvalue, "DENSE_LIMIT", 4)
    monkeypatch.setattr(NetworkComposite, "sketch", 10)
    certificate = METHOD.certify(question(), seed=0)
    assert certificate.kind is Kind.PROBABILISTIC
    assert 0.0 < certificate.failure_probability <= 1e-9
    assert 0.1 * exact < certificate.radius <= exact * 1.001


def refusal(problem: ar.Problem, method: NetworkComposite = METHOD) -> str:
    reason = method.refuses(problem)
    assert reason is not None
    return reason


def test_refusals_name_what_is_not_covered() -> None:
    torch.manual_seed(0)
    relu = ar.Problem(
        network("post", 1, "relu"), ar.TokenMeasure(random(3, D)), ar.FrobeniusBall(), parse_tolerance("2%")
    )
    assert "relu" in refusal(relu)
    affine = NetworkGraph(D, (Step("out", Affine(random(D, 2)), ("input",)),))
    problem = ar.Problem(affine, ar.TokenMeasure(random(3, D)), ar.FrobeniusBall(), parse_tolerance("2%"))
    assert "affine" in refusal(problem)


def test_a_long_run_is_refused_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkComposite, "seconds_limit", 1e-6)
    reason = refusal(question())
    assert "s, the limit is" in reason
    assert "network-composite-large" in reason
    assert NetworkCompositeLarge().refuses(question()) is None


def test_a_sentence_encoder_of_eight_tokens_is_long_and_one_of_ten_thousand_is_longer() -> None:
    torch.manual_seed(0)
    graph = network("post", 1, "gelu")
    small, large = (estimated(graph, n, n * D, sketch=64).seconds for n in (8, 10_000))
    assert small < 60.0 < large


def test_is_registered() -> None:
    assert any(type(method) is NetworkComposite for method in METHODS)
    assert any(type(method) is NetworkCompositeLarge for method in ON_REQUEST)


def test_usage_grows_to_infinity_and_never_to_nan() -> None:
    bound = METHOD.prepare(question(order="post"), seed=0)
    values = [bound.usage(radius).value for radius in (1e-6, 1e-2, 1.0, 1e3, 1e8)]
    assert all(not math.isnan(value) for value in values)
    assert values == sorted(values)
