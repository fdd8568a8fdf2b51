"""The literature's Lipschitz bounds, node by node and composed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.network.literature import (
    ActivationLipschitz,
    AttentionLipschitz,
    NetworkLipschitz,
    NormLipschitz,
)
from attnrobust.certify.network.node_bounds.activation_ranges import SHAPES
from attnrobust.certify.network.node_bounds.state_move import StateMove, token_move
from attnrobust.errors import UnsupportedModelError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.graph.activation_functions import FUNCTIONS
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import AnyToken, FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most
from tests.cases import case_named
from tests.layers.graph.networks import network

N, D = 3, 4


def given(size: float, n: int = N, d: int = D) -> StateMove:
    """A move of which only the norm is known."""
    return token_move(size, torch.full((n,), size, dtype=torch.float64), d)


def directions(count: int, *shape: int) -> Tensor:
    found = torch.randn(count, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return found / torch.linalg.vector_norm(found, dim=(-2, -1), keepdim=True)


def test_a_norm_at_its_steepest_is_met() -> None:
    """RMSNorm at 0, where the root is eps^{1/2}: small moves along the largest weight reach the bound."""
    norm = RMSNorm(torch.tensor([0.5, 3.0, 1.0, 1.0], dtype=torch.float64), eps=1e-2)
    x, size = torch.zeros(N, D, dtype=torch.float64), 1e-4
    moved = x.clone()
    moved[1, 1] = size
    reached = float(torch.linalg.vector_norm(norm(moved) - norm(x)))
    bound = NormLipschitz(norm, x).move(given(size)).frobenius
    assert 0.999 * bound < reached <= bound


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_norms_on_balls(size: float) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64), eps=1e-3)
    x = torch.randn(N, D, dtype=torch.float64)
    bound = NormLipschitz(norm, x).move(given(size)).frobenius
    reached = torch.linalg.vector_norm(norm(x + size * directions(200, N, D)) - norm(x), dim=(-2, -1))
    assert_at_most(float(reached.max()), bound)


@pytest.mark.parametrize("name", ["biases", "causal", "finite-mask", "masses"])
def test_attention_on_balls(name: str) -> None:
    case = case_named(name)
    points, mass = case.tokens.points, None if case.tokens.uniform else case.tokens.mass
    bound = AttentionLipschitz(case.attention, points, mass)
    for size in (1e-3, 1.0):
        moved = points + size * directions(100, *points.shape)
        masses = None if mass is None else mass.expand(100, -1)
        change = case.attention(moved, masses) - case.attention(points, mass)
        found = bound.move(given(size, *points.shape)).frobenius
        assert 0.0 < float(torch.linalg.vector_norm(change, dim=(-2, -1)).max()) <= found
    assert bound.move(given(0.0, *points.shape)).frobenius == 0.0
    if mass is not None:  # beside fixed tokens the masses do not sum to 1
        heavier = AttentionLipschitz(case.attention, points, 1.4 * mass).move(given(1.0, *points.shape))
        assert heavier.frobenius == pytest.approx(found, rel=1e-12)


def test_large_outputs_do_not_hide_a_bound() -> None:
    case = case_named("biases")
    assert case.attention.b_v is not None
    large = replace(case.attention, b_v=case.attention.b_v * 1e12)
    bound = AttentionLipschitz(large, case.tokens.points, None).move(given(1.0, *case.tokens.points.shape))
    assert 0.0 < bound.frobenius < 1e15


@pytest.mark.parametrize("function", [*SHAPES, "relu"])
def test_activations_everywhere(function: str) -> None:
    grid = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)[:, None]
    constant = ActivationLipschitz(function).move(given(1.0, 1, 1)).frobenius
    steepest = float((FUNCTIONS[function].value(grid).diff(dim=0) / grid.diff(dim=0)).abs().max())
    assert 0.999 * constant < steepest <= constant


@pytest.mark.parametrize("threat", [FrobeniusBall(), AnyToken()], ids=lambda threat: threat.key)
@pytest.mark.parametrize(
    "goal", [Displacement(0.05, relative=True), Margin(torch.eye(3, dtype=torch.float64))], ids=str
)
@pytest.mark.parametrize("order", ["post", "pre"])
def test_no_attack_is_inside_a_radius(order: str, goal: Goal, threat: Threat) -> None:
    torch.manual_seed(5)
    graph = network(order, 1, "gelu", head="mean")
    problem = Problem(graph, TokenMeasure(torch.randn(N, D, dtype=torch.float64)), threat, goal)
    found = NetworkLipschitz().certify(problem)
    assert found.failure_probability == 0.0
    reached = attack(problem, budget=AttackBudget(restarts=2, steps=12, rounds=1)).radius
    assert 0.0 < found.radius < reached


def test_remainders_are_not_claimed() -> None:
    with pytest.raises(UnsupportedModelError, match="moves only"):
        ActivationLipschitz("relu").remainder(given(1.0))
