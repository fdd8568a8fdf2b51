"""Norms and Gram matrices of the directions against the dense ones."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnrobust.certify.margin.all_tokens.constants import constants, row_geometry
from attnrobust.certify.margin.all_tokens.majorant import initial_parameters, majorant, pieces
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.quadratic_form import functional_rows
from attnrobust.certify.margin.rows import direction_gram, margin_rows, own_block
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import frobenius, random_problem
from tests.modern_layers import modern
from tests.stress import Draw

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_norms_and_grams_of_the_directions(seed: int) -> None:
    problem = random_problem(50 + seed, FrobeniusBall(tokens=(1, 2)) if seed % 2 else None)
    rows = MarginBound(problem, seed=0).rows
    n, d = rows.points.shape
    unit = (torch.eye(n * d, dtype=torch.float64).reshape(n * d, n, d)) * rows.movable[:, None]
    query = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_q)
    key = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_k)
    raw = rows.queries @ key.mT + query[:, :, rows.asked] @ rows.keys.mT
    l = raw - (rows.weight * raw).sum(-1, keepdim=True)  # noqa: E741 - the directions, (n d, h, q, n)
    dense = l.permute(1, 2, 3, 0)
    torch.testing.assert_close(direction_gram(rows), dense @ dense.mT, rtol=1e-8, atol=1e-8)
    blocks = dense.reshape(*dense.shape[:-1], n, d)
    exact = blocks[:, torch.arange(rows.asked.numel()), :, rows.asked].permute(1, 0, 2, 3)
    for order in (1.0, 2.0, math.inf):
        found = own_block(rows, order)
        norm = torch.linalg.vector_norm(exact, ord=order, dim=-1)
        assert bool((found >= norm * (1.0 - 1e-9) - 1e-9).all())
        assert bool((found <= norm * (1.0 + 1e-6) + 1e-5 * norm.max()).all())


@pytest.mark.parametrize("threat", [FrobeniusBall(), FrobeniusBall(tokens=(1, 2)), PerTokenBall("linf")])
@pytest.mark.parametrize("seed", range(4))
def test_rows_on_their_own_are_those_of_all_rows(seed: int, threat: MoveThreat) -> None:
    """Constants and the majorant's products: a row that the goal does not look at changes nothing."""
    draw = Draw(seed)
    asked = row_problem(seed, threat)
    all_rows, rows = margin_rows(asked), margin_rows(asked, asked=True)
    move, budget = 0.1 * draw.normal(2, *rows.points.shape), frobenius(asked, 0.1)
    assert rows.weight.shape[1] == 1 < all_rows.weight.shape[1]
    if rows.layer.rotary is not None:  # fewer pairs of positions have a smaller largest norm
        assert bool((rows.form_norm <= all_rows.form_norm * (1.0 + 1e-12)).all())
        vars(all_rows)["form_norm"] = rows.form_norm
    goal = asked.resolved
    assert goal.functionals is not None
    assert goal.weights is not None
    found = []
    for given in (rows, all_rows):
        const = constants(given, row_geometry(given, threat), budget)
        functional = functional_rows(given, goal.weights[given.asked], goal.functionals[0])
        piece = pieces(functional, const, functional.first_norm)
        form = majorant(functional, const, piece, initial_parameters(functional))
        found.append((const.limit[:, given.asked == 2], form.gradient, form.constant, form.apply(move)))
    for own, whole in zip(*found, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-7, atol=1e-9)


def row_problem(seed: int, threat: MoveThreat) -> Problem:
    """A margin of row 2 of a layer with some of the newer parts; four heads, shared in pairs in every other layer."""
    draw = Draw(100 + seed)
    given: dict[str, Any] = {name: draw.normal(4, 3, 4) for name in ("w_q", "w_k", "w_v")} | {"b_q": draw.normal(4, 4)}
    if seed % 2:
        given |= {name: given[name][::2].repeat_interleave(2, dim=0) for name in ("w_k", "w_v")}
    layer = modern(Attention(**given), draw, 9)
    layer = replace(layer, kv_heads=2) if seed % 2 else layer
    x, readout = draw.normal(9, 3), draw.normal(2, layer.out_width)
    bias = -(readout @ layer(x)[2]) + torch.tensor([0.5, 0.0], dtype=torch.float64)
    return Problem(layer, TokenMeasure(x), threat, Margin(weight=readout, bias=bias, pool=2, label=0))
