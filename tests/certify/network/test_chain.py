"""Certificates of whole networks: moves of every state, first order, both sizes of targets, every threat and goal."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.network import clean_tails
from attnrobust.certify.network.chain import ChainBound, NetworkChain
from attnrobust.certify.network.clean_tails import curved_before, targets
from attnrobust.certify.network.node_bounds.state_move import StateMove
from attnrobust.certify.network.product import NetworkProduct, PropagatedBound
from attnrobust.certify.network.propagation import threat_move
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.graph import NetworkGraph
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.layers.graph.networks import masses, network

N, D = 3, 4
BUDGET = AttackBudget(restarts=2, steps=12, rounds=1)
THREATS: tuple[Threat, ...] = (
    FrobeniusBall(),
    FrobeniusBall(tokens=(1,)),
    PerTokenBall(),
    PerTokenBall(norm="linf", tokens=(0, 2)),
    PerTokenBall(norm="l1"),
    AnyToken(),
)


def ask(
    graph: NetworkGraph, goal: Goal | None = None, threat: Threat | None = None, *, mass: Tensor | None = None
) -> Problem:
    torch.manual_seed(11)
    x = torch.randn(N, D, dtype=torch.float64)
    tokens = TokenMeasure(x) if mass is None else TokenMeasure(x, mass)
    return Problem(graph, tokens, threat or FrobeniusBall(), goal or Displacement(0.05, relative=True))


def graph_of(order: str = "post", blocks: int = 1, activation: Any = "gelu", **options: Any) -> NetworkGraph:
    torch.manual_seed(5)
    return network(order, blocks, activation, **options)


def moved_states(problem: Problem, radius: float, count: int = 60) -> dict[str, Tensor]:
    """Changes of all states at random points of the threat's set."""
    clean = problem.clean.points
    delta = problem.moves.project(10.0 * radius * torch.randn(count, N, D, dtype=torch.float64), radius)
    graph: Any = problem.network
    before, after = graph.states(clean, problem.mass), graph.states(clean + delta, problem.mass)
    return {name: after[name] - before[name] for name in graph.names}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("order", "activation", "gated"), [("post", "gelu", False), ("pre", "silu", True)])
def test_every_state_stays_within_its_bounds(
    order: str, activation: str, gated: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dense:
        monkeypatch.setattr(clean_tails, "DENSE_TARGET", 0)
    problem = ask(graph_of(order, 2, activation, gated=gated))
    bound = ChainBound(problem, seed=0)
    for radius in (1e-3, 0.03):
        source = threat_move(problem, radius)

        def refine(name: str, moved: StateMove, rest: Mapping[str, float], r: float = radius) -> StateMove:
            return bound._refined(name, moved, rest, r)

        moves, _ = bound._network.moves(source, refine)
        plain, _ = bound._network.moves(source)
        for name, change in moved_states(problem, radius).items():
            tokens = torch.linalg.vector_norm(change, dim=-1)
            assert float(torch.linalg.vector_norm(tokens, dim=-1).max()) <= moves[name].frobenius * (1 + 1e-9)
            assert bool((tokens <= moves[name].tokens * (1 + 1e-9)).all())
            assert bool((change.abs() <= moves[name].entries * (1 + 1e-9)).all())
            assert moves[name].frobenius <= plain[name].frobenius * (1 + 1e-9)


def test_small_radii_use_the_exact_derivative() -> None:
    for goal in (Displacement(0.05, relative=True), Margin(torch.eye(D, dtype=torch.float64), pool=1)):
        problem = ask(graph_of(), goal)
        radius = 1e-7
        usage = ChainBound(problem, seed=0).usage(radius).value
        clean = problem.network.linearise(problem.clean.points)  # type: ignore[attr-defined]
        goal_ = problem.resolved
        if goal_.functionals is None:
            slope = float(torch.linalg.matrix_norm(clean.linear_map().dense(), 2)) / float(goal_.budgets[0])
        else:
            assert goal_.weights is not None
            seeds = goal_.weights[:, None] * goal_.functionals[:, None, :]
            slope = float((torch.linalg.vector_norm(clean.vjp(seeds), dim=(-2, -1)) / goal_.budgets).max())
        assert usage == pytest.approx(radius * slope, rel=1e-4)
        assert usage >= radius * slope


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.key)
@pytest.mark.parametrize(
    "goal", [Displacement(0.05, relative=True), Margin(torch.eye(3, dtype=torch.float64))], ids=lambda goal: goal.key
)
@pytest.mark.one_in(2)
def test_no_attack_is_inside_a_radius(threat: Threat, goal: Goal) -> None:
    problem = ask(graph_of("pre", 1, "relu", head="mean"), goal, threat)
    reached = attack(problem, budget=BUDGET).radius
    product, chain = NetworkProduct().certify(problem), NetworkChain().certify(problem)
    assert 0.0 < product.radius <= chain.radius * 1.02
    assert chain.radius < reached


def test_masses_and_fixed_tokens_are_covered() -> None:
    torch.manual_seed(2)
    problem = ask(graph_of("pre", 1, "gelu_tanh", head="cls"), mass=masses(N))
    assert 0.0 < NetworkChain().certify(problem).radius < attack(problem, budget=BUDGET).radius


def test_large_targets_are_bounded_by_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ask(graph_of("post", 2))
    pairs = ChainBound(problem, seed=0).usage(0.01).value
    monkeypatch.setattr(clean_tails, "DENSE_TARGET", 0)
    stacked = ChainBound(problem, seed=0).usage(0.01).value
    assert 0.8 * pairs < stacked < 2.0 * pairs


def test_classes_beyond_the_memory_use_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrobust.certify.network import chain

    problem = ask(graph_of(), Margin(torch.randn(9, D, dtype=torch.float64), pool=0))
    full = ChainBound(problem, seed=0).usage(1e-3).value
    monkeypatch.setattr(chain, "COTANGENT_NUMBERS", 1)
    few = ChainBound(problem, seed=0)
    assert len(few._classes) == 1
    assert few.usage(1e-3).value >= full * (1 - 1e-9)


def test_targets_lie_before_token_wise_maps() -> None:
    graph = graph_of("post", 1)
    assert targets(graph) == ("block0.attention.sum", "block0.norm_1", "block0.mlp.sum")
    assert curved_before(graph, "block0.norm_1") == ("block0.attention", "block0.norm_1")


def test_small_networks_are_certified_without_chance() -> None:
    problem = ask(graph_of())
    for method in (NetworkChain(), NetworkProduct()):
        assert method.certify(problem).failure_probability == 0.0
    first, second = (ChainBound(problem, seed=seed).usage(0.01).value for seed in (0, 1))
    assert first == second
    assert PropagatedBound(problem, seed=0, name="network-product").first_guess
