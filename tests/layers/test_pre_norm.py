"""Attention behind its block's norm."""

from dataclasses import replace

import pytest
import torch

from attnrobust.attacks.measures.expand import expand_layer
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.normalisation import RMSNorm
from attnrobust.layers.pre_norm import PreNormAttention
from tests.assertions import assert_close
from tests.pre_norm_layers import pre_norm_layer
from tests.stress import Draw


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_attention_of_the_normalised_tokens(seed: int) -> None:
    draw = Draw(seed)
    layer = pre_norm_layer(draw, seed=seed, n=5, d=6)
    x = 3.0 * draw.normal(2, 5, 6)
    own = x if layer.residual else torch.zeros(1, dtype=torch.float64)
    assert_close(layer(x), layer.attention(layer.norm(x)) + own, rtol=1e-14, what="output")
    assert_close(layer(x), layer.folded(layer.unit(x)) + own, rtol=1e-12, what="norm's weights in the attention's")
    at = torch.tensor([1, 4])
    assert_close(layer.rows(x, at), layer(x)[:, at], rtol=1e-12, what="rows")


def test_what_does_not_fit_is_refused() -> None:
    layer = pre_norm_layer(Draw(0), seed=0, n=4, d=6)
    with pytest.raises(InputError, match="width 5"):
        PreNormAttention(RMSNorm(weight=torch.ones(5)), layer.attention)
    narrow = replace(layer.attention, w_o=None)
    with pytest.raises(InputError, match="cannot be added"):
        PreNormAttention(layer.norm, narrow, residual=True)


def test_its_name_and_its_parts_are_its_identity() -> None:
    first, second = (pre_norm_layer(Draw(0), seed=0, n=4, d=6) for _ in range(2))
    assert first.digest == second.digest
    assert first.digest != PreNormAttention(first.norm, first.attention).digest
    assert {"residual"} == first.features - PreNormAttention(first.norm, first.attention).features


def test_copies_of_tokens_are_refused_as_for_its_attention() -> None:
    layers = [pre_norm_layer(Draw(seed), seed=seed, n=4, d=6) for seed in range(6)]
    layer = next(layer for layer in layers if layer.attention.rotary is not None)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        expand_layer(layer, torch.tensor([0, 0, 1, 2, 3]), 4)
