"""Whole networks as the search evaluates them: the same function, in two precisions, in bounded memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.memory import bytes_of_a_row
from attnrobust.attacks.search.prepared_network import KEPT, prepared_network
from attnrobust.goals import Displacement
from attnrobust.layers.graph import Affine, GraphBuilder, NetworkGraph, Scale
from attnrobust.layers.graph.attend import Attend
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close
from tests.layers.graph.networks import ACTIVATIONS, D, attention, examples, masses, network, random

N = 5
QUICK = AttackBudget(restarts=3, steps=12, rounds=1)
EXAMPLES = tuple(name for name, _ in examples(ACTIVATIONS))


def tokens() -> TokenMeasure:
    return TokenMeasure(random(N, D))


def graph_named(name: str) -> NetworkGraph:
    torch.manual_seed(3)
    return dict(examples(ACTIVATIONS))[name]


def with_gradient(f: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = f(x)
    (gradient,) = torch.autograd.grad((value * torch.arange(1.0, value.numel() + 1.0).view_as(value)).sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("weighed", [False, True], ids=["equal", "masses"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_the_graph(name: str, weighed: bool) -> None:
    graph, x = graph_named(name), random(2, N, D)
    mass = masses(N).expand(2, N) if weighed else None
    expected = with_gradient(lambda y: graph(y, mass), x)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 3e-4)):
        prepared = prepared_network(graph, dtype)
        assert prepared is prepared_network(graph, dtype)
        found = with_gradient(lambda y: prepared(y, graph.masses(mass, N)).to(torch.float64), x)  # noqa: B023
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol=rtol)


def test_masks_scales_and_nodes_that_are_not_known() -> None:
    class Other(Affine):
        """A kind of node that has no fused form."""

    mask = torch.zeros(N, N, dtype=torch.float64)
    mask[1, 3] = -torch.inf
    builder = GraphBuilder(D)
    builder.add("masked", Attend(attention(mask=mask)))
    builder.add("plain", Attend(replace(attention(), w_o=None, b_o=None, b_q=None, b_k=None, b_v=None)))
    builder.add("scaled", Scale(random(6)))
    builder.add("other", Other(random(6, 3), random(3)))
    graph, x = builder.build(), random(2, N, D)
    found = with_gradient(lambda y: prepared_network(graph, torch.float32)(y, graph.masses(None, N)).double(), x)
    for one, other in zip(found, with_gradient(graph, x), strict=True):
        assert_close(one, other, rtol=3e-4)


# ---- the evaluator ---------------------------------------------------------------------------------------------------


def evaluator_of(tolerance: float) -> Evaluator:
    torch.manual_seed(0)
    problem = Problem(network("pre", 2, "gelu"), tokens(), FrobeniusBall(), Displacement(tolerance, relative=True))
    return Evaluator([problem], memory_bytes=1 << 30)


def test_float32_where_it_is_exact_enough() -> None:
    assert evaluator_of(0.1).graphs[0].dtype is torch.float32
    small = evaluator_of(1e-6)
    assert small.graphs[0].dtype is torch.float64
    assert float(small.resolution) < 1e-11
    moves = 1e-6 * random(1, 2, N, D)
    shares, gradient = small.shares_and_gradient(moves, torch.zeros(1, 2, dtype=torch.int64))
    problem = small.problems[0]
    assert_close(shares[0, :, 0], problem.usage(moves[0]), rtol=1e-6)
    assert gradient.dtype is torch.float64


def test_normal_products_are_those_of_the_jacobian() -> None:
    evaluator = evaluator_of(0.1)
    problem, v = evaluator.problems[0], random(1, 2, N, D)
    dense = torch.func.jacrev(problem.network)(problem.clean.points).flatten(2).flatten(0, 1)
    with torch.no_grad():
        found = evaluator.normal_product(v)
    expected = (v[0].flatten(1) @ dense.T @ dense).view_as(v[0]) / problem.resolved.violated_at**2
    assert_close(found[0], expected, rtol=1e-10)


def test_the_memory_of_a_row_is_what_autograd_keeps() -> None:
    """``sin`` keeps its input; the product keeps both factors, the weight once for all rows."""
    weight = random(D, 3)
    row = N * D * 8

    def f(x: Tensor) -> Tensor:
        return torch.sin(2.0 * x) @ weight

    assert bytes_of_a_row(f, random(N, D)) == int(1.7 * row)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_cut_to_fit_the_memory(rows: int) -> None:
    whole = evaluator_of(0.1)
    small = Evaluator(whole.problems, memory_bytes=rows * whole.bytes_of_a_row)
    assert small.rows_at_once == rows
    moves, target = 0.1 * random(1, 5, N, D), torch.zeros(1, 5, dtype=torch.int64)
    for one, other in zip(
        small.shares_and_gradient(moves, target), whole.shares_and_gradient(moves, target), strict=True
    ):
        assert_close(one, other, rtol=1e-4)


# ---- attacks ---------------------------------------------------------------------------------------------------------

THREATS: tuple[MoveThreat, ...] = (
    FrobeniusBall(),
    FrobeniusBall(tokens=(0, 2)),
    PerTokenBall(),
    PerTokenBall("linf"),
    PerTokenBall("l1"),
    AnyToken(),
)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.key)
@pytest.mark.parametrize("tolerance", [0.1, 1e-6], ids=["float32", "float64"])
@pytest.mark.one_in(2)
def test_every_threat_on_moves(threat: MoveThreat, tolerance: float) -> None:
    """What is found in float32 is verified in float64, and as near as a search in float64 finds it."""
    torch.manual_seed(1)
    graph, clean = network("pre", 2, "gelu_tanh"), tokens()
    problem = Problem(graph, clean, threat, Displacement(tolerance, relative=True))
    result = attack(problem, budget=QUICK)
    assert result.status is Status.FOUND
    assert result.perturbed is not None
    assert float(problem.usage(result.perturbed - clean.points)) >= 1.0
    as_any_map = Problem(_Hidden(graph), clean, threat, Displacement(tolerance, relative=True))
    assert_at_most(result.radius, attack(as_any_map, budget=QUICK).radius * 1.02)


@pytest.mark.parametrize("method", ["default", "foolbox:DDN"])
def test_a_limit_of_queries_is_never_exceeded(method: str) -> None:
    """Preparation of the network and verification included; 8 restarts of 60 steps would need many more."""
    torch.manual_seed(1)
    problem = Problem(network("pre", 2, "gelu_tanh"), tokens(), FrobeniusBall(), Displacement(0.1, relative=True))
    assert attack(problem, budget=AttackBudget(restarts=8)).queries > 60
    result = attack(problem, method=method, budget=AttackBudget(restarts=8, queries=60))
    assert 0 < result.queries <= 60
    assert result.status is Status.FOUND


class _Hidden:
    """A graph that the search does not know as one: autograd in float64."""

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph, self.width, self.out_width, self.digest = graph, graph.width, graph.out_width, graph.digest
        self.output_mass = graph.output_mass

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        return self.graph(x, mass)


def test_same_bits_whatever_the_companions() -> None:
    from attnrobust.attacks import attack_many

    torch.manual_seed(2)
    graph = network("pre", 1, "gelu")
    inputs = [Problem(graph, tokens(), FrobeniusBall(), Displacement(t, relative=True)) for t in (0.1, 1e-6, 0.2)]
    together = attack_many(inputs, budget=QUICK)
    for problem, result in zip(inputs, together, strict=True):
        assert attack(problem, budget=QUICK).radius == result.radius


def test_fused_weights_of_the_last_graphs_are_kept() -> None:
    graphs = [network("pre", 1, "gelu") for _ in range(KEPT + 1)]
    first = prepared_network(graphs[0], torch.float32)
    for graph in graphs[1:KEPT]:
        prepared_network(graph, torch.float32)
    assert prepared_network(graphs[0], torch.float32) is first
    for graph in graphs[1:]:
        prepared_network(graph, torch.float32)
    assert prepared_network(graphs[0], torch.float32) is not first
