"""The regulariser is the constant behind each layer's certificate, and its gradient is that of the constant."""

from typing import Any

import pytest
import torch
from torch import nn

from attnrobust.certify.closed_form.claims import Quantity
from attnrobust.errors import InputError
from attnrobust.layers.spectral import cap_spectral_norms
from attnrobust.layers.trainable import (
    TrainableAttention,
    TrainableCosineAttention,
    TrainableL2Attention,
    TrainableLipschitzNormAttention,
    TrainableSigmoidAttention,
)
from attnrobust.lipschitz.regulariser import regulariser
from attnrobust.lipschitz.table import bounds_table
from tests.assertions import refused

N, RADIUS = 5, 2.0
CERTIFICATES = {
    TrainableL2Attention: "kim2021-l2",
    TrainableCosineAttention: "cosine-lipschitz",
    TrainableSigmoidAttention: "sigmoid-ball",
    TrainableLipschitzNormAttention: "dasoulas2021-lipschitznorm",
}
each_kind = pytest.mark.parametrize("kind", list(CERTIFICATES))


@pytest.mark.parametrize("sizes", [{}, {"out_width": 0}], ids=str)
@each_kind
def test_it_is_the_certified_constant(kind: type[TrainableAttention[Any]], sizes: dict[str, int]) -> None:
    layer = kind(6, 2, **sizes)  # type: ignore[arg-type]
    value = float(regulariser(layer, tokens=N, radius=RADIUS).detach())
    table = bounds_table(layer.spec(), n=N, radius=RADIUS, search=0)
    (certified,) = (
        row.value for row in table.bounds if row.name == CERTIFICATES[kind] and row.quantity is Quantity.BALL
    )
    assert certified <= value <= certified * (1.0 + 1e-8)
    found = table.best_lower(Quantity.BALL)
    assert found is not None
    assert 0 < found.value <= value


@each_kind
def test_its_gradient(kind: type[TrainableAttention[Any]]) -> None:
    layer = kind(4, 2, dtype=torch.float64)
    regulariser(layer, tokens=N, radius=RADIUS).backward()
    weight = layer.get_parameter("w_q")
    assert weight.grad is not None
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for sign in (1.0, -1.0):
            weight.add_(sign * step)
            ends.append(float(regulariser(layer, tokens=N, radius=RADIUS)))
            weight.sub_(sign * step)
    assert ends[0] - ends[1] == pytest.approx(2.0 * float((weight.grad * step).sum()), rel=1e-4, abs=1e-12)


def test_layers_of_a_module_add_up_and_caps_bound_it() -> None:
    first, second = TrainableL2Attention(4, 2), TrainableL2Attention(4, 2, causal=True)
    total = regulariser(nn.Sequential(first, nn.Linear(4, 4), second), tokens=N)
    assert float(total.detach()) == pytest.approx(
        float((regulariser(first, tokens=N) + regulariser(second, tokens=N)).detach())
    )
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=10.0)
    capped = cap_spectral_norms(first, 1.0)
    bound = regulariser(capped, tokens=1)  # one token: scale |w_q|^2 |w_v| |w_o| a head, scale = 1 / sqrt(2)
    assert float(bound.detach()) <= 2.0 * 0.5**0.5 * (1.0 + 1e-6)


def test_refusals() -> None:
    with refused(InputError, "no trainable attention layer"):
        regulariser(nn.Linear(2, 2), tokens=3)
    with refused(InputError, "radius"):
        regulariser(TrainableSigmoidAttention(4, 2), tokens=3)
    with refused(InputError, "tokens"):
        regulariser(TrainableL2Attention(4, 2), tokens=0)
