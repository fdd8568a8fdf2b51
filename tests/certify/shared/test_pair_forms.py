"""Lemmas of docs/rotary-certificates.md by themselves, against derivatives of the scores of the layer."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement import remainder
from attnrobust.certify.displacement.base import MovingRows, ValueRows
from attnrobust.certify.margin.all_tokens import constants
from attnrobust.certify.margin.all_tokens.constants import row_geometry
from attnrobust.certify.margin.rows import MarginRows, direction_gram, own_block
from attnrobust.certify.shared.pair_forms import gauge, key_gradient_norms, largest_form_norm
from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from attnrobust.threats.moves import FrobeniusBall
from tests.modern_layers import random_rotary
from tests.stress import Draw

SEEDS = pytest.mark.parametrize("seed", range(5))


def layer_and_points(seed: int, n: int = 4) -> tuple[Attention, Tensor]:
    """Two heads with biases, wide or narrow keys, any turns, sometimes a negative scale; no row is saturated."""
    draw = Draw(seed)
    d, k = draw.integer(2, 6), draw.integer(2, 5)
    given: dict[str, Any] = {name: 0.6 * draw.normal(2, d, k) for name in ("w_q", "w_k", "w_v")}
    given |= {name: draw.normal(2, k) for name in ("b_q", "b_k")}
    layer = Attention(**given, scale=draw.between(-0.5, 0.5), rotary=random_rotary(draw, n=n, k=k))
    return layer, draw.normal(n, d)


def derivatives(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the scores: (h, i, j, l, d) and (h, i, j, l, d, l', d)."""
    first = torch.func.jacrev(layer.scores)(x)
    return first.detach(), torch.func.jacrev(torch.func.jacrev(layer.scores))(x).detach()


@SEEDS
def test_norms_of_the_forms_and_of_the_key_gradients(seed: int) -> None:
    layer, x = layer_and_points(seed)
    first, second = derivatives(layer, x)
    n = len(x)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    exact = torch.stack([torch.linalg.matrix_norm(second[:, i, j, i, :, j], 2) for i, j in off], dim=1)
    own = 0.5 * torch.stack([second[:, i, i, i, :, i] for i in range(n)], dim=1)  # symmetric part of A_ii
    largest = largest_form_norm(layer, n)
    assert bool((largest >= exact.amax(-1) * (1.0 - 1e-12)).all())
    plain = torch.linalg.matrix_norm(layer.factor * layer.w_q @ layer.w_k.mT, 2)
    assert bool((largest <= torch.maximum(plain, exact.amax(-1)) * (1.0 + 1e-6)).all())
    assert bool((largest[:, None] >= torch.linalg.matrix_norm(own, 2) * (1.0 - 1e-12)).all())
    queries = layer.factor * layer.queries(x)
    for order in (1.0, 2.0, torch.inf):
        norms = key_gradient_norms(layer, queries, queries.shape[1], order=order)
        for i, j in off:
            slope = torch.linalg.vector_norm(first[:, i, j, j], ord=order, dim=-1)
            torch.testing.assert_close(norms[:, i, j], slope, rtol=1e-9, atol=1e-12)


@SEEDS
def test_the_gauge_is_above_the_gram_and_commutes_with_every_turn(seed: int) -> None:
    layer, x = layer_and_points(seed)
    found = gauge(layer)
    above = torch.linalg.eigvalsh(torch.diag_embed(found) - layer.w_k.mT @ layer.w_k)
    assert float(above.min()) >= 0.0
    draw = Draw(seed + 100)
    moves = draw.normal(30, *x.shape)
    query, key = (layer.turned(torch.einsum("bnd,hdk->bhnk", moves, w)) for w in (layer.w_q, layer.w_k))
    products = layer.factor * query @ key.mT  # p_il
    length = layer.factor**2 * (query.square() * found[:, None]).sum(-1)
    images = (key.square() / found[:, None]).sum(-1)
    assert bool((images <= moves.square().sum(-1)[:, None] * (1.0 + 1e-9)).all())
    assert bool((products.square() <= length[..., None] * images[..., None, :] * (1.0 + 1e-9)).all())
    combined = draw.normal(len(x))
    sums = ((combined[:, None] * key / found[:, None].sqrt()).sum(-2) ** 2).sum(-1)
    assert bool(((products @ combined).square() <= length * sums[..., None] * (1.0 + 1e-9)).all())


@SEEDS
@pytest.mark.parametrize("some", [False, True])
def test_the_functionals_of_both_certificates(seed: int, some: bool) -> None:
    """Norms and Gram matrices of the l_j against the centred derivative of the scores."""
    layer, x = layer_and_points(seed)
    n = len(x)
    movable = torch.tensor([not some or j in (1, 2) for j in range(n)])
    first = derivatives(layer, x)[0] * movable[:, None]
    weights = layer.weights(x)
    dense = first - torch.einsum("hij,hijld->hild", weights, first)[:, :, None]
    exact = dense.flatten(-2) @ dense.flatten(-2).mT
    rows = MarginRows(layer, x, None, movable=movable.to(x))
    torch.testing.assert_close(direction_gram(rows), exact, rtol=1e-8, atol=1e-8)
    moving = MovingRows(ValueRows(layer, x, None), None, movable)
    torch.testing.assert_close(moving.gram, exact, rtol=1e-8, atol=1e-8)
    reach = exact.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    torch.testing.assert_close(moving.logit_reach, reach, rtol=1e-6, atol=1e-5)
    assert bool((moving.logit_reach >= reach * (1.0 - 1e-9)).all())
    norms = row_geometry(rows, FrobeniusBall()).norms
    index = torch.arange(n)
    own = torch.linalg.vector_norm(dense[:, index, :, index].permute(1, 0, 2, 3), dim=-1)
    assert bool((norms.own >= own * (1.0 - 1e-9)).all())
    torch.testing.assert_close(own_block(rows, torch.inf) >= 0.0, torch.ones_like(own, dtype=torch.bool))
    other = (reach.square() - own.square()).clamp_min(0.0).sqrt()
    torch.testing.assert_close(norms.other, other, rtol=1e-5, atol=1e-5)


def test_many_tokens_use_bounds_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the Gram limit the key and query parts are bounded apart: never below the exact value."""
    layer, x = layer_and_points(3)
    rows = MarginRows(layer, x, None, movable=torch.ones(len(x), dtype=x.dtype))
    weights = layer.weights(x)
    geometry = row_geometry(rows, FrobeniusBall())
    exact = constants.largest_quadratic(rows, geometry, weights)
    apart = constants.largest_quadratic(rows, replace(geometry, gram=None), weights)
    assert bool((apart >= exact * (1.0 - 1e-9)).all())
    assert bool((apart <= 4.0 * exact + 1e-9).all())
    moving = MovingRows(ValueRows(layer, x, None), None, torch.ones(len(x), dtype=torch.bool))
    exact = remainder.RemainderMajorant(moving).diagonal_reach(weights)
    monkeypatch.setattr(remainder, "GRAM_LIMIT", 0)
    apart = remainder.RemainderMajorant(moving).diagonal_reach(weights)
    assert bool((apart >= exact * 0.8).all())  # the exact one is a matrix norm, up to 4^(1/8) above the eigenvalue


UNIT = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
NOWHERE = torch.zeros(1, 3, 1, dtype=torch.float64)


def form_norms(layer: Attention, n: int) -> Tensor:
    """``||A_il||_2`` of every pair, from the tables that the layer turns with; (h, n, n)."""
    queries, keys = (layer.turned(w[:, :, None].expand(-1, -1, n, -1)) for w in (layer.w_q, layer.w_k))
    forms = layer.factor * torch.einsum("hdik,helk->hilde", queries, keys)
    norms: Tensor = torch.linalg.matrix_norm(forms, 2)
    return norms


@pytest.mark.parametrize("offset", [0, 10**6, 10**12])
def test_forms_that_are_only_the_rounding_of_large_angles_are_covered(offset: int) -> None:
    """Whole turns a token: the forms would vanish, but angles are rounded to units of their own size."""
    rotary = Rotary(torch.tensor([2.0 * math.pi], dtype=torch.float64), offset=offset)
    layer = Attention(UNIT, UNIT.roll(1, dims=2), NOWHERE, rotary=rotary, scale=1.0)
    assert float(largest_form_norm(layer, 4)) >= float(form_norms(layer, 4).max())
