"""The feed-forward part against torch and by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.token_map import TokenMap
from tests.assertions import assert_close, refused, shapes_unchecked

MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_agrees_with_torch(name: Any, bias: bool) -> None:
    first, second = nn.Linear(3, 7, bias=bias).double(), nn.Linear(7, 2, bias=bias).double()
    layer = Mlp(w_1=first.weight.T, w_2=second.weight.T, b_1=first.bias, b_2=second.bias, activation=name)
    x = 3.0 * torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert_close(layer(x), second(MODULES[name](first(x))), rtol=1e-13)
    assert (layer.width, layer.out_width) == (3, 2)
    assert isinstance(layer, TokenMap)


def test_values_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = {
        "gelu": 0.5 * (1 + math.erf(1 / math.sqrt(2))),
        "gelu_tanh": 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)),
        "silu": 1 / (1 + math.exp(-1)),
    }
    for name, value in expected.items():
        chosen: Any = name
        assert float(Mlp(w_1=one, w_2=one, activation=chosen)(one)) == pytest.approx(value, rel=1e-14)


def test_digests() -> None:
    w_1, w_2, chosen = torch.randn(3, 3), torch.randn(3, 3), list(MODULES)
    kinds: list[Any] = chosen
    layers = [Mlp(w_1=w_1, w_2=w_2, activation=name) for name in kinds]
    layers += [
        Mlp(w_1=w_2, w_2=w_1),
        Mlp(w_1=w_1, w_2=w_2, b_1=torch.ones(3)),
        Mlp(w_1=w_1, w_2=w_2, b_2=torch.ones(3)),
    ]
    assert len({layer.digest for layer in layers}) == len(layers)


def test_refuses() -> None:
    w_1, w_2 = torch.randn(3, 7), torch.randn(7, 2)
    wrong: Any = "gleu"
    with shapes_unchecked(), refused(UnknownNameError, "gleu", "gelu"):
        Mlp(w_1=w_1, w_2=w_2, activation=wrong)
    with shapes_unchecked(), refused(InputError, "w_2 must have shape"):
        Mlp(w_1=w_1, w_2=torch.randn(6, 2))
    with shapes_unchecked(), refused(InputError, "b_1 must have shape"):
        Mlp(w_1=w_1, w_2=w_2, b_1=torch.ones(6))
    with shapes_unchecked(), refused(InputError, "b_2 must have shape"):
        Mlp(w_1=w_1, w_2=w_2, b_2=torch.ones(7))
