"""Norms and Gram matrices of the directions against the dense ones."""

import math

import pytest
import torch

from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.rows import direction_gram, own_block
from attnrobust.threats.moves import FrobeniusBall
from tests.margin_problems import random_problem

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_norms_and_grams_of_the_directions(seed: int) -> None:
    problem = random_problem(50 + seed, FrobeniusBall(tokens=(1, 2)) if seed % 2 else None)
    rows = MarginBound(problem, seed=0).rows
    n, d = rows.points.shape
    unit = (torch.eye(n * d, dtype=torch.float64).reshape(n * d, n, d)) * rows.movable[:, None]
    query = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_q)
    key = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_k)
    raw = rows.queries @ key.mT + query @ rows.keys.mT
    l = raw - (rows.weight * raw).sum(-1, keepdim=True)  # noqa: E741 - the directions, (n d, h, n, n)
    dense = l.permute(1, 2, 3, 0)
    torch.testing.assert_close(direction_gram(rows), dense @ dense.mT, rtol=1e-8, atol=1e-8)
    blocks = dense.reshape(*dense.shape[:-1], n, d)
    index = torch.arange(n)
    exact = blocks[:, index, :, index].permute(1, 0, 2, 3)
    for order in (1.0, 2.0, math.inf):
        found = own_block(rows, order)
        norm = torch.linalg.vector_norm(exact, ord=order, dim=-1)
        assert bool((found >= norm * (1.0 - 1e-9) - 1e-9).all())
        assert bool((found <= norm * (1.0 + 1e-6) + 1e-5 * norm.max()).all())
