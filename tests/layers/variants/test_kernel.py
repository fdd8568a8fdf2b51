"""Attention with a given kernel, against the dot-product layer and a loop."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants, refute_constants
from tests.assertions import assert_close, refused, shapes_unchecked

D, E, N = 3, 4, 5
A = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, 0.0], [-0.4, 0.2, 0.6]], dtype=torch.float64)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return x @ A @ y.transpose(-1, -2)


def laplace(x: Tensor, y: Tensor) -> Tensor:
    return -torch.cdist(x, y)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_the_dot_product_kernel_is_dot_product_attention() -> None:
    w_v, x, mass = random(D, E), random(2, N, D), torch.softmax(random(2, N), dim=-1)
    layer = KernelAttention(dot, "dot", w_v)
    reference = Attention(w_q=A[None], w_k=torch.eye(D, dtype=torch.float64)[None], w_v=w_v[None], scale=1.0)
    assert_close(layer(x), reference(x), rtol=1e-13)
    assert_close(layer(x, mass), reference(x, mass), rtol=1e-13)
    assert_close(layer(x, mass[0]), reference(x, mass[0]), rtol=1e-13)
    assert isinstance(layer, TokenMap)
    assert (layer.width, layer.out_width) == (D, E)


def test_agrees_with_a_loop() -> None:
    w_v, x, mass = random(D, E), random(N, D), torch.softmax(random(N), dim=0)
    rows = []
    for i in range(N):
        weights = np.array([float(mass[j]) * math.exp(-math.dist(x[i].tolist(), x[j].tolist())) for j in range(N)])
        rows.append(weights @ (x @ w_v).numpy() / weights.sum())
    assert_close(KernelAttention(laplace, "laplace", w_v)(x, mass), torch.from_numpy(np.stack(rows)), rtol=1e-13)


def test_digest() -> None:
    constants = KernelConstants(diameter=1.0, oscillation=1.0, query_slope=1.0, key_slope=1.0)
    w_v = random(D, E)
    layers = [
        KernelAttention(dot, "dot", w_v),
        KernelAttention(dot, "dot 2", w_v),
        KernelAttention(dot, "dot", 2 * w_v),
        KernelAttention(dot, "dot", w_v, constants),
    ]
    assert len({layer.digest for layer in layers}) == len(layers)


def test_refuses() -> None:
    with refused(InputError, "key"):
        KernelAttention(dot, "", random(D, E))
    wrong = KernelAttention(lambda x, y: (x * y).sum(dim=-1), "rows", random(D, E))
    with shapes_unchecked(), refused(InputError, "scores have shape"):
        wrong(random(N, D))


@pytest.mark.parametrize("name", ["diameter", "oscillation", "query_slope", "key_slope"])
def test_constants(name: str) -> None:
    good = {"diameter": 2.0, "oscillation": 2.0, "query_slope": 1.0, "key_slope": 1.0}
    for bad in (-1.0, math.inf, math.nan):
        with refused(InputError, name):
            KernelConstants(**(good | {name: bad}))
    ball = random(40, D)
    ball = ball / ball.norm(dim=-1, keepdim=True)
    refute_constants(KernelAttention(laplace, "laplace", random(D, E), KernelConstants(**good)), ball)
    small: dict[str, Any] = good | {name: 0.5}
    with refused(InputError, name, "already need"):
        refute_constants(KernelAttention(laplace, "laplace", random(D, E), KernelConstants(**small)), ball)


def test_nothing_to_refute() -> None:
    with refused(InputError, "no constants"):
        refute_constants(KernelAttention(dot, "dot", random(D, E)), random(4, D))
