"""The constants of a radius hold at random members of the set."""

from dataclasses import replace

import pytest
import torch

from attnrobust.certify.margin.all_tokens.constants import constants, largest_quadratic
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.layers.attention import Attention
from attnrobust.numerics.exponential import psi
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from tests.margin_problems import frobenius, radius_of, random_problem
from tests.stress import Draw, boundary_moves


@pytest.mark.parametrize("norm", ["frobenius", "l2", "linf", "l1"])
@pytest.mark.parametrize("seed", range(5))
def test_ranges_and_masses_of_the_constants(norm: str, seed: int) -> None:
    """Lemmas 2, 3 and 4 at random members of the set."""
    threat = FrobeniusBall() if norm == "frobenius" else PerTokenBall(norm)  # type: ignore[arg-type]
    problem = random_problem(300 + seed, threat)
    bound = MarginBound(problem, seed=0)
    rows, layer = bound.rows, problem.network
    assert isinstance(layer, Attention)
    for share in (0.1, 0.7):
        radius = radius_of(problem, share)
        const = constants(rows, bound.geometry, frobenius(problem, radius))
        if float(const.limit.max()) > 600.0:
            continue  # the certificate says nothing there, and e^u overflows here
        moves = boundary_moves(problem, radius, 200, Draw(seed))
        change = layer.scores(problem.clean.points + moves) - layer.scores(problem.clean.points)
        change = change[..., rows.asked, :]
        change = torch.where(torch.isneginf(rows.log_weight), 0.0, change)
        u = change - (rows.weight * change).sum(-1, keepdim=True)
        visible = ~torch.isneginf(rows.log_weight)
        assert bool((u.abs() <= const.limit + 1e-9)[:, visible].all())
        mass = (rows.weight * psi(u)).sum(-1)
        part = mass / (1.0 + mass)
        assert bool((part <= const.share + 1e-9).all())
        token = rows.weight * psi(u) / (1.0 + mass[..., None])
        assert bool((token <= 0.5 * const.saturating * u**2 + 1e-12).all())


@pytest.mark.parametrize("seed", range(4))
def test_large_and_small_inputs_use_the_same_eigenvalue_bound(seed: int) -> None:
    """The split of key and query part (long inputs) is an upper bound of what the Gram matrices give."""
    problem = random_problem(70 + seed, FrobeniusBall())
    bound = MarginBound(problem, seed=0)
    coefficient = Draw(seed).normal(*bound.rows.weight.shape).abs()
    exact = largest_quadratic(bound.rows, bound.geometry, coefficient)
    wide = largest_quadratic(bound.rows, replace(bound.geometry, gram=None), coefficient)
    assert bool((wide >= exact * (1.0 - 1e-6)).all())
