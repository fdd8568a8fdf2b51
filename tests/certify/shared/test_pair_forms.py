"""The bilinear forms of a layer with rotary positions: bounds of them hold for the angles that the layer uses."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.shared.pair_forms import gauge, largest_form_norm
from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from tests.stress import Draw

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


@pytest.mark.parametrize("seed", range(8))
def test_every_form_is_below_its_bounds(seed: int) -> None:
    draw = Draw(seed)
    planes, n = draw.integer(1, 2), draw.integer(1, 5)
    rotary = Rotary(
        10 ** draw.between(-2.0, 3.0) * draw.normal(planes),
        layout=("half", "interleaved")[seed % 2],
        offset=draw.integer(-9, 999),
    )
    w_q, w_k = (draw.normal(2, 3, 5) * 10 ** draw.normal(1, 1, 5) for _ in range(2))
    layer = Attention(w_q, w_k, draw.normal(2, 3, 1), rotary=rotary)
    norms = form_norms(layer, n).amax((1, 2))
    assert bool((norms <= largest_form_norm(layer, n)).all())
    assert bool((norms >= 0.999 * largest_form_norm(layer, n)).all())
    diagonal = gauge(layer)
    inside = torch.linalg.eigvalsh(torch.diag_embed(diagonal) - w_k.mT @ w_k)
    assert bool((inside >= -1e-9 * diagonal.amax(1, keepdim=True)).all())
    moves = draw.normal(2, n, 5)
    turned = layer.turned(moves)
    assert torch.allclose((turned.square() * diagonal[:, None]).sum(-1), (moves.square() * diagonal[:, None]).sum(-1))
