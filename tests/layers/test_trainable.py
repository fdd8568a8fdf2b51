"""Trainable layers: the specification is the same function, training works, and state dictionaries round-trip."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attnrobust.errors import InputError
from attnrobust.layers.trainable import (
    TrainableAttention,
    TrainableCosineAttention,
    TrainableL2Attention,
    TrainableLipschitzNormAttention,
    TrainableSigmoidAttention,
)
from tests.assertions import assert_close, assert_same_bits, refused

D, HEADS, N = 6, 2, 5
Kind = type[TrainableAttention[Any]]
KINDS: list[Kind] = [
    TrainableL2Attention,
    TrainableCosineAttention,
    TrainableSigmoidAttention,
    TrainableLipschitzNormAttention,
]
each_kind = pytest.mark.parametrize("kind", KINDS)
SIZES: list[dict[str, Any]] = [{}, {"head_width": 5}, {"out_width": 3}, {"out_width": 0}, {"bias": False}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@each_kind
def test_the_specification_is_the_same_function(kind: Kind, sizes: dict[str, Any]) -> None:
    layer = kind(D, HEADS, dtype=torch.float64, **sizes)
    if layer.b_o is not None:
        nn.init.normal_(layer.b_o)
    x = torch.randn(3, N, D, dtype=torch.float64)
    with torch.no_grad():
        assert_same_bits(layer.spec()(x), layer(x))
    inner = sizes.get("head_width", D // HEADS)
    assert layer(x).shape[-1] == (sizes.get("out_width", D) or HEADS * inner)


@each_kind
def test_initial_weights(kind: Kind) -> None:
    layer = kind(48, 4)
    assert layer.b_o is not None
    assert_same_bits(layer.b_o.detach(), torch.zeros(48))
    for name in (*layer.weights, "w_o"):
        weight = layer.get_parameter(name).detach()
        assert weight.shape == (4, 48, 12) if name != "w_o" else (4, 12, 48)
        # Uniform on [-b, b] with b^2 = 6 / (48 + 48); 2304 draws fix the standard deviation b / sqrt(3) to about 1 %.
        assert float(weight.abs().max()) <= 0.25
        assert float(weight.std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)


@each_kind
def test_single_precision(kind: Kind) -> None:
    layer, x = kind(D, HEADS), torch.randn(N, D)
    output = layer(x).detach()
    assert output.dtype == torch.float32
    assert_close(output.double(), layer.spec()(x.double()), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_masses(kind: Kind) -> None:
    layer = kind(D, HEADS, dtype=torch.float64)
    x, mass = torch.randn(N, D, dtype=torch.float64), torch.softmax(torch.randn(N, dtype=torch.float64), dim=0)
    assert_same_bits(layer.spec()(x, mass), layer(x, mass).detach())


@each_kind
def test_training_reaches_every_weight_and_leaves_the_specification(kind: Kind) -> None:
    torch.manual_seed(3)
    layer = kind(D, HEADS)
    inputs, target = torch.randn(16, N, D), torch.randn(16, N, D)
    spec, start = layer.spec(), {name: p.detach().clone() for name, p in layer.named_parameters()}
    digest, weight = spec.digest, spec.w_v.clone()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(layer(inputs), target)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]
    for name, parameter in layer.named_parameters():
        assert float((parameter.detach() - start[name]).abs().max()) > 1e-3, name
    assert_same_bits(spec.w_v, weight)
    assert layer.spec().digest != digest == spec.digest


@each_kind
def test_inside_a_model_and_its_state_dictionary(kind: Kind) -> None:
    model = nn.Sequential(nn.Linear(4, D), kind(D, HEADS))
    again = nn.Sequential(nn.Linear(4, D), kind(D, HEADS))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, N, 4)
    assert_same_bits(again(x).detach(), model(x).detach())
    assert sum(p.requires_grad for p in model.parameters()) == 2 + len(list(kind(D, HEADS).parameters()))


@each_kind
def test_bfloat16_autocast_and_checkpoint(kind: Kind) -> None:
    layer, x = kind(D, HEADS), torch.randn(2, N, D)
    half = kind(D, HEADS, dtype=torch.bfloat16)
    output = half(x.bfloat16())
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert_close(output.detach().double(), half.spec()(x.bfloat16().double()), rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(layer(x).detach().double(), layer.spec()(x.double()), rtol=0.05)
    again = checkpoint(layer, x, use_reentrant=False)
    assert_same_bits(again.detach(), layer(x).detach())
    (gradient,) = torch.autograd.grad(again.square().sum(), layer.w_q)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.w_q)
    assert_same_bits(gradient, plain)


COMPILED = """
import torch
from attnrobust.layers import trainable
for name in ("L2", "Cosine", "Sigmoid", "LipschitzNorm"):
    layer, x = getattr(trainable, f"Trainable{name}Attention")(6, 2), torch.randn(2, 5, 6)
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(output, layer(x), rtol=1e-5, atol=1e-6), name
    output.sum().backward()
    assert layer.w_q.grad is not None
"""


@pytest.mark.slow
def test_every_kind_compiles_as_one_graph() -> None:
    # in a process of its own: what checks shapes here cannot be traced
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_mass_zero_hides_padding(kind: Kind) -> None:
    layer, x = kind(D, HEADS, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    mass = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64) / 3.0
    if kind is not TrainableL2Attention:  # L2 attention centres tokens, which changes the rounding alone
        assert_same_bits(layer(x, mass)[:3].detach(), layer(torch.cat([x[:3], 9.0 * x[3:]]), mass)[:3].detach())
    assert_close(layer(x, mass)[:3].detach(), layer(x[:3]).detach(), rtol=1e-12)


def test_causal_l2_attention() -> None:
    layer, x = TrainableL2Attention(D, HEADS, causal=True, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    for n in range(1, N + 1):  # every row is the last one of its own prefix
        assert_close(layer(x)[n - 1].detach(), TrainableL2Attention.forward(layer, x[:n])[-1].detach(), rtol=1e-12)
    spec = layer.spec()
    assert spec.causal
    assert "causal" in spec.features
    whole = TrainableL2Attention(D, HEADS, dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    assert_close(layer(x)[-1].detach(), whole(x)[-1].detach(), rtol=1e-12)
    assert float((layer(x)[0] - whole(x)[0]).detach().abs().max()) > 1e-3


def test_dropout_is_part_of_training_only() -> None:
    layer, x = TrainableL2Attention(D, HEADS, dropout=0.5), torch.randn(20, N, D)
    share = float((layer(x) == 0).double().mean())
    assert 0.4 < share < 0.6
    with refused(InputError, "eval"):
        layer.spec()
    assert_close(layer.eval()(x).detach().double(), layer.spec()(x.double()), rtol=1e-5)
    with refused(InputError, "dropout"):
        TrainableL2Attention(D, HEADS, dropout=1.0)


def test_cosine_numbers() -> None:
    spec = TrainableCosineAttention(D, HEADS, tau=3.0, nu=0.5, eps=0.1).spec()
    assert (spec.tau, spec.nu, spec.eps) == (3.0, 0.5, 0.1)
    with refused(InputError, "tau"):
        TrainableCosineAttention(D, HEADS, tau=0.0)


@pytest.mark.parametrize(
    "sizes", [(5, 2, {}), (0, 1, {}), (4, 0, {}), (4, 2, {"head_width": 0}), (4, 2, {"out_width": -1})]
)
def test_refuses_sizes(sizes: tuple[int, int, dict[str, int]]) -> None:
    width, heads, more = sizes
    with refused(InputError, "width"):
        TrainableSigmoidAttention(width, heads, **more)  # type: ignore[arg-type]
