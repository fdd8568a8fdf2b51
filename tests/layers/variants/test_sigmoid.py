"""Sigmoid attention without queries."""

import math
from dataclasses import replace

import torch

from tests.assertions import assert_close
from tests.layer_variants import D, H, K, N, random, sigmoid


def test_sigmoid_without_queries_is_half_the_mean() -> None:
    layer, x = sigmoid(w_q=torch.zeros(H, D, K)), random(N, D)
    expected = 0.5 * torch.cat([x.mean(dim=0) @ w for w in layer.w_v])
    assert_close(layer(x), expected.expand(N, -1), rtol=1e-13)
    shifted = replace(layer, shift=math.log(3.0))  # sigma(log 3) = 3/4
    assert_close(shifted(x), 1.5 * expected.expand(N, -1), rtol=1e-13)
