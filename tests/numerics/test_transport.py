"""Exact transport: closed forms, both sides, agreement of the solvers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.transport import coupling_cost, wasserstein
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close

ORDERS = (1, 2, math.inf)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(n: int, seed: int, *, equal: bool = False) -> TokenMeasure:
    mass = None if equal else torch.softmax(2 * draw(n, seed=seed + 50), dim=0)
    return TokenMeasure(draw(n, 3, seed=seed)) if mass is None else TokenMeasure(draw(n, 3, seed=seed), mass)


def value(first: TokenMeasure, second: TokenMeasure, order: float) -> float:
    return wasserstein(first, second, order=order).upper.value


@pytest.mark.parametrize("order", ORDERS)
def test_equal_masses_are_the_best_of_all_permutations(order: float) -> None:
    for seed in range(5):
        first, second = measure(5, seed, equal=True), measure(5, seed + 100, equal=True)
        every = [
            float(coupling_cost(second.points[list(p)] - first.points, first.mass, order=order))
            for p in itertools.permutations(range(5))
        ]
        assert_close(torch.tensor(value(first, second, order)), torch.tensor(min(every)), rtol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_two_sides_agree_and_the_plan_is_a_coupling(order: float) -> None:
    for seed in range(5):
        first, second = measure(6, seed), measure(9, seed + 100)
        found = wasserstein(first, second, order=order)
        assert_at_most(found.lower.value, found.upper.value)
        assert_at_most(found.upper.value, found.lower.value, rtol=1e-9)
        assert_close(found.plan.sum(dim=1), first.mass, rtol=1e-12)
        assert_close(found.plan.sum(dim=0), second.mass, rtol=1e-12)


def test_one_dimension_is_the_quantile_formula() -> None:
    first = TokenMeasure(
        torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    )
    second = TokenMeasure(
        torch.tensor([[0.5], [3.0]], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    )
    # quarters of mass: 0 -> .5, 1 -> .5, 1 -> 3 twice
    assert value(first, second, 1) == pytest.approx((0.5 + 0.5 + 2 + 2) / 4, rel=3e-12)
    assert value(first, second, 2) == pytest.approx(math.sqrt((0.25 + 0.25 + 4 + 4) / 4), rel=3e-12)
    assert value(first, second, math.inf) == 2.0


@pytest.mark.parametrize("order", ORDERS)
def test_metric_axioms(order: float) -> None:
    a, b, c = measure(4, 1), measure(7, 2), measure(5, 3, equal=True)
    assert value(a, a, order) <= 1e-12
    assert value(a, b, order) == pytest.approx(value(b, a, order), rel=1e-10)
    assert_at_most(value(a, c, order), value(a, b, order) + value(b, c, order), rtol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_splitting_an_atom_in_place_costs_nothing(order: float) -> None:
    whole = measure(4, 1)
    points = torch.cat([whole.points, whole.points[:1]])
    mass = torch.cat([whole.mass, whole.mass[:1] / 3])
    mass[0] *= 2 / 3
    assert value(whole, TokenMeasure(points, mass), order) <= 1e-7


def test_orders_increase() -> None:
    a, b = measure(6, 4), measure(8, 5)
    one, two, most = (value(a, b, order) for order in ORDERS)
    assert one <= two <= most


def test_a_coupling_never_goes_below() -> None:
    for seed in range(10):
        first = measure(6, seed)
        move = draw(6, 3, seed=seed + 7)
        for order in ORDERS:
            moved = TokenMeasure(first.points + move, first.mass)
            assert_at_most(
                wasserstein(first, moved, order=order).lower.value,
                float(coupling_cost(move, first.mass, order=order)),
                rtol=1e-12,
            )


def test_tiny_moves_keep_their_digits() -> None:
    first = TokenMeasure(100 * draw(5, 3), torch.softmax(draw(5), dim=0))
    move = 1e-6 * draw(5, 3, seed=3)
    for order in ORDERS:
        found = wasserstein(first, TokenMeasure(first.points + move, first.mass), order=order)
        expected = float(coupling_cost(first.points + move - first.points, first.mass, order=order))
        assert found.upper.value == pytest.approx(expected, rel=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="order 3"):
        wasserstein(measure(3, 1), measure(3, 2), order=3.0)
    with pytest.raises(InputError, match="widths 3 and 2"):
        wasserstein(measure(3, 1), TokenMeasure(draw(3, 2)))
    with pytest.raises(InputError, match="order 3"):
        coupling_cost(draw(3, 2), torch.ones(3, dtype=torch.float64), order=3.0)
