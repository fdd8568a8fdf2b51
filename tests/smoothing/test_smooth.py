"""The smoothed decision: exact on linear networks, abstention, threats, refusals, and what the counts prove."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.graph import Activate, Affine, GraphBuilder, NetworkGraph
from attnrobust.problem import Problem
from attnrobust.smoothing import Smoothing, smooth
from attnrobust.smoothing.smooth import _proves_other
from attnrobust.smoothing.votes import Voters, decided, probability_above, probability_below
from attnrobust.threats.measures import WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import refused
from tests.layers.graph.networks import masses, network, random

N, D = 3, 4
READOUT = Margin(torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]).double(), pool="mean")


def linear() -> NetworkGraph:
    builder = GraphBuilder(D)
    builder.add("same", Affine(torch.eye(D, dtype=torch.float64)))
    return builder.build()


def tokens(first: float) -> TokenMeasure:
    x = random(N, D)
    x[:, 0] = first
    return TokenMeasure(x)


def exact(threat: MoveThreat, first: float) -> float:
    """The decision is the sign of the mean first coordinate: its radius under a threat is ``2 first / dual norm``."""
    gradient = torch.zeros(N, D, dtype=torch.float64)
    gradient[:, 0] = 1.0 / N
    return first / float(threat.dual_norm(gradient))


@pytest.mark.parametrize("threat", [FrobeniusBall(), FrobeniusBall(tokens=(1,)), AnyToken(), PerTokenBall("linf")])
def test_linear_decisions_are_their_own_smoothed_ones(threat: MoveThreat) -> None:
    problem = Problem(linear(), tokens(0.4), threat, READOUT)
    smoothing = Smoothing(0.5, samples=4000)
    found, radius = smooth(problem, smoothing, seed=3), exact(threat, 0.4)
    assert found.majority == found.label == 0
    assert found.certified_radius <= radius <= found.attack_radius <= 1.25 * radius
    assert found.gap == found.attack_radius / found.certified_radius
    if isinstance(threat, FrobeniusBall):  # noise and threat are of one kind: what is lost is the sample's
        assert found.certified_radius >= 0.85 * radius
    again = smooth(problem, smoothing, seed=3)
    assert replace(again, seconds=0.0) == replace(found, seconds=0.0)
    assert smooth(problem, smoothing, seed=4).certified_radius != found.certified_radius


def test_a_decision_near_its_boundary_is_left_open() -> None:
    found = smooth(Problem(linear(), tokens(1e-4), FrobeniusBall(), READOUT), 1.0)
    assert found.abstained
    assert (found.certified_radius, found.attack_radius, found.gap) == (0.0, math.inf, math.inf)
    assert found.probability < 0.5


def test_the_majority_may_differ_from_the_model() -> None:
    """The model decides for 0 on a strip ``0 < x < .2``; under noise of width 1 nearly every decision is 1."""
    builder = GraphBuilder(1)
    builder.add("lines", Affine(torch.tensor([[1.0, 1.0]]).double(), torch.tensor([0.0, -0.1]).double()))
    builder.add("kinks", Activate("relu"))
    builder.add("hat", Affine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).double(), torch.tensor([-0.01, 0.0]).double()))
    readout = Margin(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), pool=0)
    problem = Problem(builder.build(), TokenMeasure(torch.tensor([[0.1]])), FrobeniusBall(), readout)
    found = smooth(problem, 1.0)
    assert (found.label, found.majority) == (0, 1)
    assert found.certified_radius > 0.5
    assert found.attack_radius == math.inf


@pytest.mark.parametrize("order", ["pre", "post"])
def test_no_attack_lies_inside_a_certified_radius(order: str) -> None:
    torch.manual_seed(2)  # of four seeds one where the model's decision changes near by
    x = TokenMeasure(random(N, D), masses(N))
    readout = Margin(random(3, D), pool="mean", bias=0.1 * random(3))
    problem = Problem(network(order, 1, "gelu"), x, FrobeniusBall(), readout)
    found = smooth(problem, Smoothing(0.05, samples=500))
    assert found.certified_radius <= found.attack_radius
    assert found.attack_radius < math.inf
    assert found.attack_share < 0.5


def test_noise_stays_on_the_tokens_that_move() -> None:
    problem = Problem(linear(), tokens(0.4), FrobeniusBall(tokens=(1,)), READOUT)
    (noise,) = Voters(problem, 2.0).noise(500, torch.Generator().manual_seed(0))
    assert not bool(noise[:, [0, 2]].any())
    assert 1.9 < float(noise[:, 1].std()) < 2.1


def test_ties_and_broken_margins_are_no_decision_for_the_label() -> None:
    margins = torch.tensor(
        [[1.0, 2.0], [0.0, 2.0], [3.0, -1.0], [math.nan, 1.0], [-math.inf, 1.0]], dtype=torch.float64
    )
    assert decided(margins).tolist() == [0, 1, 2, 3, 3]


def test_votes_for_nobody_prove_nothing() -> None:
    assert not _proves_other(torch.tensor([0, 0, 0, 1000]), 1e-3)
    assert _proves_other(torch.tensor([0, 1000, 0, 0]), 1e-3)


@pytest.mark.parametrize(("successes", "samples"), [(0, 20), (7, 20), (20, 20), (997, 1000)])
def test_clopper_pearson(successes: int, samples: int) -> None:
    """At the bound itself, so many successes or more are exactly as unlikely as the failure that is allowed."""
    low, high = (bound(successes, samples, 1e-3) for bound in (probability_below, probability_above))
    assert 0.0 <= low <= successes / samples <= high <= 1.0
    if successes > 0:
        assert stats.binom.sf(successes - 1, samples, low) == pytest.approx(1e-3, rel=1e-6)
    if successes < samples:
        assert stats.binom.cdf(successes, samples, high) == pytest.approx(1e-3, rel=1e-6)


def test_refusals() -> None:
    x = tokens(0.4)
    with refused(InputError, "smoothing is about a decision"):
        smooth(Problem(linear(), x, FrobeniusBall(), Displacement(0.1)), 0.5)
    with refused(UnsupportedThreatError, "smoothing covers moved tokens"):
        smooth(Problem(linear(), x, WassersteinBall(2), READOUT), 0.5)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"sigma": math.nan}, "sigma"),
        ({"sigma": 1.0, "samples": 3}, "at least 10 samples"),
        ({"sigma": 1.0, "failure_probability": 0.7}, "between 0 and 0.5"),
    )
    for values, message in wrong:
        with refused(InputError, message):
            Smoothing(**values)
