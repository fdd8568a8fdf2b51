"""LipschitzNorm attention: homogeneous, zero at zero, no masses."""

import torch

from attnrobust.errors import UnsupportedModelError
from tests.assertions import assert_close, assert_same_bits, refused
from tests.layer_variants import D, H, K, N, V, lipschitznorm, random


def test_lipschitznorm_is_homogeneous() -> None:
    layer, x = lipschitznorm(b_o=random(H * V)), random(N, D)
    assert layer.b_o is not None
    for factor in (1e-6, 3.0, 1e6):
        assert_close(layer(factor * x) - layer.b_o, factor * (layer(x) - layer.b_o), rtol=1e-9)


def test_lipschitznorm_of_zero_is_zero() -> None:
    for layer in (lipschitznorm(), lipschitznorm(w_q=torch.zeros(H, D, K)), lipschitznorm(w_k=torch.zeros(H, D, K))):
        zero = torch.zeros(N, D, dtype=torch.float64)
        assert_same_bits(layer(zero), torch.zeros(N, H * V, dtype=torch.float64))
        assert bool(torch.isfinite(torch.func.jacrev(layer)(zero)).all())
    silent, x = lipschitznorm(w_q=torch.zeros(H, D, K)), random(N, D)
    assert_close(silent(x), torch.cat([x.mean(dim=0) @ w for w in silent.w_v]).expand(N, -1), rtol=1e-13)


def test_lipschitznorm_refuses_masses() -> None:
    with refused(UnsupportedModelError, "counts tokens"):
        lipschitznorm()(random(N, D), torch.full((N,), 1 / N, dtype=torch.float64))
