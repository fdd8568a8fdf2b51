"""Networks built to break the composite certificate: widening maps, margins without slope, many classes."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.composite.method import NetworkComposite
from attnrobust.certify.network.composite.nodes.base import Ball, Channel
from attnrobust.certify.network.composite.nodes.normalise import NormaliseRemainder
from attnrobust.certify.network.composite.recursion import Recursion, TargetNorms
from attnrobust.certify.network.composite.targets import Port
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    Attend,
    NetworkGraph,
    Normalise,
    Product,
    Scale,
    Step,
    Sum,
)
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.numerics.chance import ROW_FAILURE
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.layers.graph.networks import D, network, random

METHOD = NetworkComposite()


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def flat_to_third_order() -> tuple[Step, ...]:
    """``tanh(2 x)/2 - x``: no first or second derivative at 0, so that every deviation behind it is a remainder."""
    return (
        Step("scaled", Scale(2.0), ("input",)),
        Step("bent", Activate("tanh"), ("scaled",)),
        Step("back", Scale(0.5), ("bent",)),
        Step("minus", Scale(-1.0), ("input",)),
        Step("flat", Sum(), ("back", "minus")),
    )


def normalised(gain: float, norm: Normalise) -> NetworkGraph:
    """A widening map with a large gain into what a normalisation reads; the readout sees the remainder of the node."""
    wide = Affine(matrix((0.0, 0.0, gain, 0.0), (0.0, 0.0, 0.0, gain)), torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    read = Affine(matrix((1.0,), (1.0,), (0.0,), (0.0,)))
    steps = (Step("wide", wide, ("flat",)), Step("norm", norm, ("wide",)), Step("read", read, ("norm",)))
    return NetworkGraph(2, (*flat_to_third_order(), *steps))


def attended(gain: float) -> NetworkGraph:
    """The same into what attention reads."""
    one = matrix((1.0,), (0.0,), (0.0,))
    layer = Attention(
        w_q=one[None], w_k=one[None], w_v=matrix((0.0,), (1.0,), (0.0,))[None], w_o=matrix((1.0, 0.0))[None]
    )
    keep, places = Affine(matrix((1.0, 0.0), (0.0, 0.0))), AddPositions(matrix((0.0, 1.0), (0.0, -0.5)))
    steps = (
        Step("keep", keep, ("flat",)),
        Step("places", places, ("keep",)),
        Step("wide", Affine(matrix((gain, 0.0, 0.0), (0.0, 1.0, 0.0))), ("places",)),
        Step("attention", Attend(layer), ("wide",)),
    )
    return NetworkGraph(2, (*flat_to_third_order(), *steps))


def found(problem: Problem, radius: float) -> float:
    """Largest usage of random moves of this size, half of them of the first coordinate alone."""
    moves = torch.randn(2000, *problem.clean.points.shape, dtype=torch.float64)
    moves[:1000, 0, 1:] = 0.0
    return float(problem.usage(radius * moves / torch.linalg.vector_norm(moves, dim=(1, 2), keepdim=True)).max())


def climbed(problem: Problem, radius: float) -> float:
    """Largest usage found by ascent on the sphere of this radius."""
    moves, best = torch.randn(8, *problem.clean.points.shape, dtype=torch.float64), 0.0
    for _ in range(15):
        moves = (radius * moves / torch.linalg.vector_norm(moves, dim=(1, 2), keepdim=True)).requires_grad_(True)
        usage = problem.usage(moves)
        best = max(best, float(usage.detach().max()))
        (moves,) = torch.autograd.grad(usage.sum(), moves)
    return best


@pytest.mark.parametrize("gain", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", ["rms", "layer", "attention"])
def test_remainders_that_a_widening_map_enlarges(kind: str, gain: float) -> None:
    ones = torch.ones(4, dtype=torch.float64)
    norms: dict[str, LayerNorm | RMSNorm] = {
        "rms": RMSNorm(weight=ones, eps=1e-5),
        "layer": LayerNorm(weight=ones, eps=1e-5),
    }
    network = attended(gain) if kind == "attention" else normalised(gain, Normalise(norms[kind]))
    rows = 2 if kind == "attention" else 1
    problem = Problem(network, TokenMeasure(torch.zeros(rows, 2)), FrobeniusBall(), Displacement(0.01))
    bound = METHOD.prepare(problem, seed=0)
    for radius in (0.03, 0.1, 0.3, 1.0):
        assert found(problem, radius) <= bound.usage(radius).value * (1.0 + 1e-9)


def test_a_margin_without_slope_keeps_its_curvature() -> None:
    """``tanh(x)^2`` against .01: no gradient at 0, one moving number."""
    steps = (
        Step("bent", Activate("tanh"), ("input",)),
        Step("squared", Product(), ("bent", "bent")),
        Step("both", Affine(matrix((0.0, 1.0)), torch.tensor([0.01, 0.0]).double()), ("squared",)),
    )
    goal = Margin(torch.eye(2, dtype=torch.float64), pool=0)
    problem = Problem(NetworkGraph(1, steps), TokenMeasure(torch.zeros(1, 1)), FrobeniusBall(), goal)
    bound = METHOD.prepare(problem, seed=0)
    for radius in (0.01, 0.05, 0.1, 0.11):
        usage = float(problem.usage(torch.full((1, 1), radius, dtype=torch.float64)))
        assert usage <= bound.usage(radius).value <= 1.05 * usage


@pytest.mark.parametrize("order", ["post", "pre"])
def test_margins_of_random_blocks(order: str) -> None:
    """Ascent on the drop at every size of the move; near at small ones."""
    torch.manual_seed(11)
    graph = network(order, 1, "gelu", head="mean")
    goal = Margin(torch.eye(3, dtype=torch.float64), pool=0)
    problem = Problem(graph, TokenMeasure(random(3, D)), FrobeniusBall(), goal)
    bound = METHOD.prepare(problem, seed=0)
    closest = 0.0
    for radius in (1e-3, 0.03, 0.1, 0.3, 1.0):
        usage, limit = climbed(problem, radius), bound.usage(radius).value
        assert usage <= limit * (1.0 + 1e-9)
        closest = max(closest, usage / limit)
    assert closest > 0.9


@pytest.mark.parametrize("classes", [3, 40])
def test_many_classes_share_one_failure_probability(classes: int) -> None:
    steps = (
        Step("one", Activate("tanh"), ("input",)),
        Step("mixed", Affine(random(6, 6)), ("one",)),
        Step("two", Activate("tanh"), ("mixed",)),
        Step("out", Affine(random(6, 8)), ("two",)),
    )
    goal = Margin(random(classes, 8), pool=0)
    bound = METHOD.prepare(Problem(NetworkGraph(6, steps), TokenMeasure(random(6, 6)), FrobeniusBall(), goal), seed=0)
    bound.usage(1e-3)
    assert 0.0 < bound.failure_probability <= ROW_FAILURE


def test_a_remainder_that_overflows_is_not_nothing() -> None:
    """A gain of 1e65 overflows the fourth powers of a normalisation; infinity over infinity is no bound."""
    problem = Problem(
        normalised(1e65, Normalise(RMSNorm(weight=torch.ones(4, dtype=torch.float64), eps=1e-5))),
        TokenMeasure(torch.zeros(1, 2)),
        FrobeniusBall(),
        Displacement(0.01),
    )
    bound = METHOD.prepare(problem, seed=0)
    for radius in (1e-3, 1.0):
        assert found(problem, radius) <= bound.usage(radius).value
    norms = TargetNorms(curvature=0.0, third=0.0, cross=0.0, sources=(), tails={("node", "own"): 1.0}, quadratics={})
    recursion = Recursion({}, {}, 1.0, {})
    recursion._channels, recursion.balls = (
        {"node": {"own": Channel(torch.clone, torch.clone, (1,))}},
        {"node": Ball(1.0, 0.0, 0.0)},
    )
    whole, levels = recursion.whole, (recursion.beyond, recursion.further, recursion.lifted)
    for sizes in (whole, *levels, recursion.quadratic, recursion.cubic, recursion.quartic):
        sizes[("node", "own")] = math.nan
    assert math.isnan(recursion.at(norms).whole)


def test_attention_narrower_than_the_input() -> None:
    layer = Attention(w_q=random(2, 3, 2), w_k=random(2, 3, 2), w_v=random(2, 3, 2), w_o=random(2, 2, 3))
    steps = (
        Step("bent", Activate("tanh"), ("input",)),
        Step("narrow", Affine(random(6, 3)), ("bent",)),
        Step("attention", Attend(layer), ("narrow",)),
    )
    problem = Problem(NetworkGraph(6, steps), TokenMeasure(random(3, 6)), FrobeniusBall(), Displacement(0.1))
    bound = METHOD.prepare(problem, seed=0)
    for radius in (1e-3, 0.1):
        assert 0.0 < found(problem, radius) <= bound.usage(radius).value


def test_nodes_refuse_a_port_with_a_map_that_they_do_not_count() -> None:
    norm, ones = LayerNorm(weight=torch.ones(4, dtype=torch.float64), eps=1e-5), torch.ones(1, 2, dtype=torch.float64)
    port = Port("norm", ("wide",), ("narrow",), (random(2, 4),), (ones,))
    with pytest.raises(ValueError, match="has a map in front"):
        NormaliseRemainder(port, norm, random(1, 4))
