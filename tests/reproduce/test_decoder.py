"""Norms of the derivative of causal rotary layers, and the ascent over token counts."""

from itertools import pairwise

import torch

from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from attnrobust.reproduce.decoder import ascents, norms


def layer() -> Attention:
    draw = torch.Generator().manual_seed(0)
    w_q, w_k, w_v = (torch.randn(2, 4, 2, generator=draw, dtype=torch.float64) for _ in range(3))
    w_o = torch.randn(2, 2, 4, generator=draw, dtype=torch.float64)
    frequencies = torch.tensor([0.3], dtype=torch.float64)
    return Attention(w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, causal=True, rotary=Rotary(frequencies))


def test_more_tokens_never_have_a_smaller_derivative() -> None:
    lengths, radius = (1, 2, 4), 2.0
    inputs = ascents(layer(), lengths, radius, steps=2, seed=0)
    assert [len(points) for points in inputs] == list(lengths)
    assert all(float(torch.linalg.vector_norm(points, dim=-1).max()) <= radius for points in inputs)
    found = [float(norms(layer(), points, 0)["found"] or 0.0) for points in inputs]
    assert all(more >= 0.99 * fewer for fewer, more in pairwise(found))  # ACCURACY of the norms


def test_norms_from_below_and_above() -> None:
    points = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = norms(layer(), points, 0)
    exact = torch.linalg.matrix_norm(
        torch.autograd.functional.jacobian(layer(), points).reshape(16, 16),
        ord=2,
    )
    found, upper = row["found"], row["local_upper"]
    assert isinstance(found, float)
    assert isinstance(upper, float)
    assert 0.98 * float(exact) <= found <= float(exact) * (1 + 1e-9) <= upper * (1 + 2e-9) <= 1.1 * float(exact)
