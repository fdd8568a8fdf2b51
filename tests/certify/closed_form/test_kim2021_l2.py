"""The constants of L2 attention: the spread bound, all of space, and where they are tight."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.certify.closed_form.claims import Quantity
from attnrobust.certify.closed_form.kim2021_l2 import KimL2, derived_constant, reported_constant, spread_bound
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.lipschitz.table import bounds_table
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.seeded_variants import l2, variant_problem


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
        usage = (
            KimL2().prepare(variant_problem(layer, spread, FrobeniusBall(), Displacement(1.0)), seed=0).usage(1.0).value
        )
        assert usage <= reported_constant(layer, 6).value * (1 + 1e-9) * math.sqrt(layer.heads)


def test_kim_refusals() -> None:
    with pytest.raises(InputError, match="l2"):
        reported_constant(l2(0), 3, norm="l1")
    with pytest.raises(InputError, match="odds"):
        spread_bound(-1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_constants_hold_with_a_causal_mask(seed: int) -> None:
    """Ascent stays below them, for all rows, for the largest entry, and for finite moves."""
    layer, centre = replace(l2(seed), causal=True), torch.zeros(4, 3, dtype=torch.float64)
    found = lipschitz_search(layer, centre, 4.0, restarts=4, steps=20, seed=seed).lower.value
    assert found <= derived_constant(layer, 4).value
    assert found <= reported_constant(layer, 4).value
    entries = lipschitz_search(layer, centre, 4.0, norm="linf", restarts=4, steps=10, seed=seed).lower.value
    assert entries <= reported_constant(layer, 4, norm="linf").value
    problem = Problem(layer, TokenMeasure(torch.randn(4, 3)), FrobeniusBall(), Displacement(0.5))
    certified = certify(problem, methods=["kim2021-l2"]).best
    assert certified is not None
    attacked = attack(problem, seed=seed, budget=AttackBudget(restarts=2, steps=20, rounds=1))
    assert 0 < certified.radius <= attacked.radius


def test_a_causal_layer_is_no_map_of_measures() -> None:
    layer = replace(l2(0), causal=True)
    table = bounds_table(layer, n=3, radius=1.0, search=0)
    assert not {Quantity.W1, Quantity.W2, Quantity.CONTEXT} & {row.quantity for row in table.bounds}
    assert "mask" in {entry.method: entry.reason for entry in table.skipped}["vuckovic2020-kernel"]
    problem = Problem(layer, TokenMeasure(torch.randn(3, 3)), CouplingBall(2, domain_radius=5.0), Displacement(0.5))
    with pytest.raises(InputError, match="mask"):
        attack(problem)
