"""The Gram bound is above every spectral norm and near it; capped weights stay below their limit."""

import pytest
import torch

from attnrobust.errors import InputError
from attnrobust.layers.spectral import cap_spectral_norms, gram_norm_upper
from attnrobust.layers.trainable import TrainableSigmoidAttention
from tests.assertions import refused


@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 4, 4), (1, 1, 7), (2, 40, 64)])
@pytest.mark.parametrize("size", [1e-120, 1.0, 1e120])
def test_the_bound_is_above_the_norm_and_near_it(shape: tuple[int, ...], size: float) -> None:
    matrices = size * torch.randn(shape, dtype=torch.float64)
    norms = torch.linalg.matrix_norm(matrices, ord=2)
    upper = gram_norm_upper(matrices)
    assert bool((upper >= norms * (1.0 - 1e-13)).all())
    assert bool((upper <= norms * min(shape[1:]) ** (1.0 / 256.0) * (1.0 + 1e-13)).all())


def test_equal_singular_values_are_the_worst_case() -> None:
    upper = gram_norm_upper(torch.eye(64, dtype=torch.float64), squarings=2)
    assert float(upper) == pytest.approx(64.0 ** (1.0 / 16.0), rel=1e-12)


def test_capped_weights_and_their_gradient() -> None:
    layer = cap_spectral_norms(TrainableSigmoidAttention(6, 2), 0.5, names=["w_q", "w_o"])
    spec = layer.spec()
    assert float(torch.linalg.matrix_norm(spec.w_q, ord=2).max()) <= 0.5 * (1.0 + 1e-6)
    assert float(torch.linalg.matrix_norm(spec.w_v, ord=2).max()) > 0.5  # it has no cap
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 3, 6)
    for _ in range(3):
        optimiser.zero_grad()
        layer(x).square().sum().neg().backward()
        optimiser.step()
    assert float(torch.linalg.matrix_norm(layer.spec().w_q, ord=2).max()) <= 0.5 * (1.0 + 1e-6)
    assert layer.spec().digest != spec.digest


def test_small_weights_stay_as_they_are_and_refusals() -> None:
    layer = TrainableSigmoidAttention(6, 2)
    before = layer.spec()
    assert cap_spectral_norms(layer, 1e3).spec().digest == before.digest
    with refused(InputError, "w_o"):
        cap_spectral_norms(TrainableSigmoidAttention(6, 2, out_width=0), names=["w_o"])
    with refused(InputError, "limit"):
        cap_spectral_norms(TrainableSigmoidAttention(6, 2), 0.0)
