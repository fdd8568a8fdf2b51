"""Cosine attention is bounded and nearly free of scale."""

import torch

from tests.assertions import assert_at_most, assert_close
from tests.layer_variants import D, H, N, V, cosine, random


def test_cosine_output_is_bounded_and_nearly_scale_free() -> None:
    layer, x = cosine(eps=1e-12), random(N, D)
    assert_close(layer(1000.0 * x), layer(x), rtol=1e-9)
    heads = layer(1e6 * x).reshape(N, H, V)
    assert_at_most(float(torch.linalg.vector_norm(heads, dim=-1).max()), layer.nu, rtol=1e-12)
