"""Copied and split tokens in whole networks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, MassSplitting, attack
from attnrobust.attacks.measures.expand import expand_layer, tokens_read
from attnrobust.attacks.measures.expand_graph import pools
from attnrobust.errors import UnsupportedModelError, UnsupportedThreatError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.graph import Affine, GraphBuilder, NetworkGraph, PoolRow
from attnrobust.problem import Problem
from attnrobust.results import AttackResult
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, refused
from tests.layers.graph.networks import D, network, random

N = 4
QUICK = AttackBudget(restarts=2, steps=6, rounds=1)
slow = pytest.mark.slow
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "mean": {"head": "mean"},
    "class token": {"head": "cls"},
    "causal": {"head": "last", "causal": True},
}


def graph_of(kind: str, seed: int = 0) -> NetworkGraph:
    torch.manual_seed(seed)
    return network("pre", 2, "gelu", **KINDS[kind])


def atoms_at_rest(n: int, *copied: int) -> Tensor:
    return torch.tensor(sorted([*range(n), *copied]))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_with_their_parents_mass_change_nothing(kind: str) -> None:
    """A token of mass 1/n as two atoms of half of it: every row, and what is pooled, is as before."""
    graph, x = graph_of(kind), random(N, D)
    parent = atoms_at_rest(N, 1, 3)
    counts = torch.bincount(parent).to(torch.float64)
    mass = (1.0 / (N * counts))[parent]
    expanded = expand_layer(graph, parent, N)
    assert isinstance(expanded, NetworkGraph)
    output = expanded(x[parent], mass)
    expected = graph(x)
    assert_close(output, expected if pools(graph) else expected[parent], rtol=1e-12)


def test_a_network_without_places_is_used_as_it_is() -> None:
    graph = graph_of("mean")
    assert expand_layer(graph, atoms_at_rest(N, 2), N) is graph
    assert expand_layer(graph_of("causal"), atoms_at_rest(N, 2), N) is not graph


def test_strict_copies_are_inserted_tokens() -> None:
    """A copy behind its parent under a causal mask: the network of n + 1 tokens itself."""
    torch.manual_seed(0)
    graph, x = network("pre", 2, "gelu", causal=True), random(N, D)
    parent = atoms_at_rest(N, 1)
    expanded = expand_layer(graph, parent, N, order="strict")
    assert_close(expanded(x[parent]), graph(x[parent]), rtol=1e-12)


def test_tokens_that_are_read_do_not_split() -> None:
    def read(kind: str) -> frozenset[int]:
        clean = TokenMeasure(random(N, D))
        return tokens_read(Problem(graph_of(kind), clean, CouplingBall(2), Displacement(0.1)))

    assert read("mean") == read("class token") == frozenset()  # the class token is none of the input's
    assert read("causal") == {N - 1}
    clean = TokenMeasure(random(N, D))
    assert tokens_read(Problem(graph_of("encoder"), clean, CouplingBall(2), Displacement(0.1, pool=2))) == {2}


def found(graph: NetworkGraph, threat: Threat, goal: Goal) -> tuple[Problem, AttackResult]:
    problem = Problem(graph, TokenMeasure(random(N, D)), threat, goal)
    return problem, attack(problem, budget=QUICK)


def pooled_usage(problem: Problem, result: AttackResult) -> float:
    """The used budget at the atoms, by the graph alone."""
    assert result.atoms is not None
    parent = result.atoms.parent
    order = problem.threat.order if isinstance(problem.threat, Copies) else "tied"
    network = expand_layer(problem.network, parent, N, order=order)
    output = network(result.atoms.points, result.atoms.mass)
    return float(problem.resolved.usage(output))


@pytest.mark.parametrize(
    ("kind", "threat"),
    [
        ("mean", Copies(1)),
        ("causal", Copies(1)),
        ("mean", CouplingBall(2)),
        *(pytest.param("class token", t, marks=slow) for t in (Copies(2), CouplingBall(2), CouplingBall(1))),
        *(pytest.param("causal", t, marks=slow) for t in (Copies(1, order="strict"), CouplingBall(1))),
    ],
)
def test_pooled_networks_are_attacked(kind: str, threat: Threat) -> None:
    problem, result = found(graph_of(kind), threat, Displacement(0.02, relative=True))
    assert result.status == "found"
    assert_at_most(1.0, pooled_usage(problem, result), rtol=1e-9)
    assert_at_most(result.radius, result.moving_radius, rtol=1e-9)


def test_margins_of_a_pooled_network() -> None:
    graph = graph_of("mean")
    problem, result = found(graph, Copies(2), Margin(random(3, graph.out_width), pool=0))
    assert result.status == "found"
    assert_at_most(1.0, pooled_usage(problem, result), rtol=1e-9)


@pytest.mark.parametrize(
    ("goal", "threat"),
    [
        (Displacement(0.05), Copies(1)),
        (Displacement(0.02, pool="mean"), CouplingBall(2)),
        *(pytest.param(Displacement(0.1, pool=1), t, marks=slow) for t in (Copies(1), CouplingBall(2))),
        pytest.param(Displacement(0.05), CouplingBall(2), marks=slow),
    ],
)
def test_networks_with_a_row_per_token(goal: Goal, threat: Threat) -> None:
    _, result = found(graph_of("encoder"), threat, goal)
    assert result.status == "found"
    assert result.atoms is not None
    assert_at_most(result.radius, result.moving_radius, rtol=1e-9)


def test_a_single_copy_is_chosen_by_what_it_does() -> None:
    """A tolerance that one copy alone exceeds: the radius is 0, and the copy is the strongest one."""
    graph = graph_of("mean")
    clean = TokenMeasure(random(N, D))
    rest = graph(clean.points)
    effects = [float((graph(clean.points[atoms_at_rest(N, j)]) - rest).norm()) for j in range(N)]
    best = max(range(N), key=effects.__getitem__)
    second = sorted(effects)[-2]
    goal = Displacement((max(effects) + second) / 2)
    result = attack(Problem(graph, clean, Copies(1), goal), budget=QUICK)
    assert result.radius == 0.0
    assert result.atoms is not None
    assert torch.equal(result.atoms.parent, atoms_at_rest(N, best))


def test_unknown_nodes_are_refused_by_their_state() -> None:
    class Shuffle(Affine):
        """A node that may do anything with places."""

    builder = GraphBuilder(D)
    builder.add("shuffle", Shuffle(random(D, D)))
    builder.add("row", PoolRow(0))
    graph = builder.build()
    with refused(UnsupportedModelError, "state shuffle", "Shuffle"):
        expand_layer(graph, atoms_at_rest(N, 1), N)
    for threat, attacks in ((Copies(1), "token-duplication"), (CouplingBall(2), "mass-splitting")):
        with refused(UnsupportedThreatError, attacks, "state shuffle"):
            found(graph, threat, Displacement(0.1))


def test_a_named_token_that_is_read_is_not_split() -> None:
    problem = Problem(graph_of("causal"), TokenMeasure(random(N, D)), CouplingBall(2), Displacement(0.05))
    result = attack(problem, method=MassSplitting(tokens=(N - 1,)), budget=QUICK)
    assert result.atoms is None or int(result.atoms.parent.numel()) == N
