"""The linear images are derivatives of the centred scores and of the drop."""

import pytest
import torch

from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.quadratic_form import linear_images
from attnrobust.layers.attention import Attention
from attnrobust.threats.moves import FrobeniusBall
from tests.margin_problems import random_problem
from tests.stress import Draw

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_directions_are_the_derivative_of_the_centred_scores(seed: int) -> None:
    problem = random_problem(seed, FrobeniusBall(tokens=(0, 2)) if seed % 2 else None)
    bound = MarginBound(problem, seed=0)
    rows, functional = bound.rows, bound.functionals[0].rows
    layer, x = problem.network, problem.clean.points
    assert isinstance(layer, Attention)
    move = Draw(seed).normal(*x.shape) * rows.movable[:, None]
    plain = Attention(w_q=layer.w_q, w_k=layer.w_k, w_v=layer.w_v, b_q=layer.b_q, b_k=layer.b_k, scale=layer.scale)
    _, change = torch.autograd.functional.jvp(plain.scores, x, move)
    change = change[:, rows.asked]
    # The row constant of b_k and of the query's own part drops out by centring.
    centred = change - (rows.weight * change).sum(-1, keepdim=True)
    found = linear_images(functional, move)
    visible = ~torch.isneginf(rows.log_weight)
    torch.testing.assert_close(found.x[visible], centred[visible], rtol=1e-9, atol=1e-9)
    drop = lambda y: problem.resolved.changes(problem.network(y, problem.mass))[0]  # noqa: E731
    _, slope = torch.autograd.functional.jvp(drop, x, move)
    torch.testing.assert_close((functional.gradient * move).sum(), slope, rtol=1e-8, atol=1e-9)
    first = torch.einsum("i,hi->", functional.pooling, found.d)
    torch.testing.assert_close(first, slope, rtol=1e-8, atol=1e-9)
