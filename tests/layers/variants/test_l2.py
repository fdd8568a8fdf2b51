"""L2 attention: shifts of all tokens, no queries, and why the metric is in the value path."""

import math

import numpy as np
import torch

from attnrobust.layers.variants.l2 import L2Attention
from tests import slow_layers
from tests.assertions import assert_at_most, assert_close
from tests.layer_variants import D, H, K, N, V, l2, random, slow
from tests.reference import jacobian


def test_l2_weights_do_not_change_when_all_tokens_move_alike() -> None:
    layer, x, shift = l2(scale=0.9), random(N, D), 50.0 * random(D)
    moved = shift[None] @ layer.metric @ layer.w_v
    assert_close(layer(x + shift), layer(x) + moved.flatten(), rtol=1e-12)
    # So far from 0 that squares of the coordinates (1e14) are rounded to 1e-2; the outputs (1e7) are to 1e-8.
    far = 1e7 * random(D)
    exact = torch.from_numpy(slow("l2", layer, (x + far).numpy()))
    assert_close(layer(x + far), exact, rtol=0.0, atol=1e-6)


def test_l2_without_queries_is_constant() -> None:
    layer = l2(w_q=torch.zeros(H, D, K), b_o=random(H * V))
    assert_close(layer(random(N, D)), layer.b_o.expand(N, -1), rtol=0.0)


def test_the_metric_in_the_value_path_makes_l2_attention_lipschitz() -> None:
    """Tokens far apart along the kernel of w_q^T: the weights cannot see it, the values can."""
    w_q, w_v = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    layer = L2Attention(w_q=w_q, w_v=w_v)
    norms = []
    for spread in (1.0, 10.0, 100.0):
        x = torch.tensor([[0.0, -spread], [0.5, spread]], dtype=torch.float64)
        bare = jacobian(lambda z: slow_layers.l2(z, w_q.numpy(), w_v.numpy(), metric=False), x.numpy())
        norms.append(np.linalg.norm(bare.reshape(2, 4), 2))
        norm = torch.linalg.matrix_norm(torch.func.jacrev(layer)(x).reshape(2, 4), 2)
        # Derived bound with c (c e^(c+1) = n - 1 = 1): scale |w_q|^2 |w_v| (sqrt(n) (1 + 2c) + 2c), c = 0.2785.
        assert_at_most(float(norm), math.sqrt(2) * (1 + 2 * 0.2785) + 2 * 0.2785)
    assert norms[2] > 9.0 * norms[1] > 80.0 * norms[0]
