"""Moves in the directions that a row sees: the same form as that of all moves."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.balance import moments, value_at
from attnrobust.certify.margin.all_tokens.constants import constants, row_geometry
from attnrobust.certify.margin.all_tokens.majorant import coefficients, initial_parameters, majorant, pieces
from attnrobust.certify.margin.quadratic_form import functional_rows
from attnrobust.certify.margin.reduced_rows import ReducedRows, reduced
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_close
from tests.stress import Draw

N, D, K, HEADS = 7, 23, 2, 4


def lifted(rows: ReducedRows, moves: Tensor) -> Tensor:
    """The moves of the tokens themselves."""
    whole = rows.tokens_of(moves) @ rows.basis.T
    return whole.index_add(-2, rows.asked, rows.asked_of(moves)[..., rows.basis.shape[1] :] @ rows.rest.T)


@pytest.mark.parametrize("at", [[6], [2, 5]])
def test_the_form_is_that_of_all_moves(at: list[int]) -> None:
    draw = Draw(len(at))
    shared = {name: draw.normal(2, D, K).repeat_interleave(2, dim=0) / D**0.5 for name in ("w_k", "w_v")}
    layer = Attention(
        draw.normal(HEADS, D, K) / D**0.5, w_o=draw.normal(HEADS, K, D),
        b_k=draw.normal(2, K).repeat_interleave(2, dim=0),
        causal=True, kv_heads=2, rotary=Rotary(torch.tensor([0.7])), **shared,
    )  # fmt: skip
    movable = torch.ones(N, dtype=torch.float64)
    movable[0] = 0.0
    rows = MarginRows(layer, draw.normal(N, D), None, torch.tensor(at), movable=movable)
    full = functional_rows(rows, torch.full((len(at),), 1.0 / len(at)).double(), draw.normal(D))
    (few,) = reduced([full])
    assert isinstance(few.rows, ReducedRows)
    assert few.rows.points.shape[1] == 8
    const = constants(rows, row_geometry(rows, FrobeniusBall()), MoveBudget(0.3, 0.3, 0.3))
    par = initial_parameters(full)
    par = replace(par, **{f.name: getattr(par, f.name) + 0.1 * draw.normal(1).abs() for f in fields(par)})
    whole = majorant(full, const, pieces(full, const, full.first_norm), par)
    small = majorant(few, const, pieces(few, const, few.first_norm), par)
    moves = draw.normal(3, *few.rows.points.shape) * few.rows.movable[:, None]
    moves[:, N:] = padded(few.rows, moves[:, N:])
    assert_close(small.at(moves), whole.at(lifted(few.rows, moves)), rtol=1e-10, what="values")
    assert_close(small.gradient.norm(), whole.gradient.norm(), rtol=1e-10, what="nothing of the gradient is lost")
    back = lifted(few.rows, small.apply(moves))
    assert_close(back, whole.apply(lifted(few.rows, moves)), rtol=1e-9, what="nothing of the products is lost")
    searched = coefficients(few, const, pieces(few, const, few.first_norm), par)
    assert_close(value_at(few, searched, moments(few, moves)), small.at(moves), rtol=1e-10, what="without products")


def padded(rows: ReducedRows, below: Tensor) -> Tensor:
    """Without what is beyond the width in the last row of each token."""
    p, d = rows.basis.shape[1], rows.basis.shape[0]
    apart = below.unflatten(-2, (rows.asked.numel(), -1)).flatten(-2).clone()
    apart[..., d - p :] = 0.0
    return apart.unflatten(-1, (-1, p)).flatten(-3, -2)
