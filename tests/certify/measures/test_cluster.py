"""Certificates that follow clusters of tokens: averages, weights, saturated rows, a wrong bound is noticed."""

import math
from itertools import product

import pytest
import torch

from attnrobust.attacks import AttackBudget
from attnrobust.certify.measures.cluster import highest_average, largest_weight_change
from attnrobust.comparison import UnsoundError, compare
from attnrobust.goals import Displacement
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close
from tests.measure_problems import (
    Draw,
    ask,
    one_head,
    radius_of,
)

QUICK = AttackBudget(restarts=2, steps=8, rounds=1)


def test_saturated_rows_do_not_move_until_scores_can_cross() -> None:
    """Scores 100 apart: every row reads one token, and only the value's own move counts."""
    layer = one_head([[10.0]], [[1.0]])
    clean = TokenMeasure(torch.tensor([[3.0], [-3.0]]).double())
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.5, pool=0))
    assert radius_of(problem, CouplingBall(math.inf), "measure-cluster") == pytest.approx(0.5, rel=2e-3)
    assert radius_of(problem, CouplingBall(math.inf), "measure-ball") < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_highest_average_is_the_exact_maximum(seed: int) -> None:
    draw, n = Draw(seed), 5
    weights = torch.softmax(draw(1, 2, n, scale=2.0), dim=-1)
    half = draw(1, 2, n).abs()
    values = draw(3, 1, n)
    visible = torch.ones_like(weights, dtype=torch.bool)
    best = highest_average(weights, visible, half, values)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n))).double()
    moved = weights[..., None, :] * (signs * half[..., None, :]).exp()
    moved = moved / moved.sum(dim=-1, keepdim=True)
    brute = torch.einsum("hrsn,chn->chrs", moved, values).amax(dim=-1) - torch.einsum("hrn,chn->chr", weights, values)
    assert_close(best, brute, rtol=1e-12)


def test_highest_average_where_any_weight_is_possible() -> None:
    """A hidden token never counts, one whose weight underflows does."""
    weights = torch.tensor([[[1.0, 0.0, 0.0]]]).double()
    values = torch.tensor([[[0.0, 5.0, 9.0]]]).double()
    visible = torch.tensor([[[True, True, False]]])
    half = torch.tensor([[[0.0, 1000.0, 0.0]]]).double()
    assert highest_average(weights, visible, half, values).item() == 5.0


@pytest.mark.parametrize("seed", range(4))
def test_weight_change_bounds_every_single_weight(seed: int) -> None:
    draw, n = Draw(seed), 4
    weights = torch.softmax(draw(n, scale=6.0), dim=-1)
    half = draw(n).abs() * 3
    bound = largest_weight_change(weights, half + half.max())
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n))).double()
    moved = weights * (signs * half).exp()
    change = (moved / moved.sum(dim=-1, keepdim=True) - weights).abs().amax(dim=0)
    assert bool((change <= bound * (1 + 1e-12)).all())
    # attained where all half-ranges agree
    even = torch.full_like(half, float(half.max()))
    moved = weights * (signs * even).exp()
    change = (moved / moved.sum(dim=-1, keepdim=True) - weights).abs().amax(dim=0)
    assert_close(change, largest_weight_change(weights, 2 * even), rtol=1e-9)


def test_a_contradiction_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that forgets the query part is caught by the splitting attack."""
    from attnrobust.certify.measures import cluster as measure_cluster

    monkeypatch.setattr(measure_cluster, "_displaced", lambda *_: torch.zeros(1, dtype=torch.float64))
    with pytest.raises(UnsoundError, match="measure-cluster"):
        compare(ask(CouplingBall(math.inf)), budget=QUICK)
