"""LayerNorm and RMSNorm: formula, torch, invariances, and the radius and Lipschitz constant that hold everywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.token_map import TokenMap
from attnrobust.models.normalisation import normalisation_from_torch
from tests import slow_layers
from tests.assertions import assert_at_most, assert_close, refused, shapes_unchecked

D, N = 6, 4
Norm = type[LayerNorm] | type[RMSNorm]
each_norm = pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
each_bias = pytest.mark.parametrize("bias", [True, False])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(kind: Norm, *, bias: bool = True, eps: float = 0.01) -> LayerNorm | RMSNorm:
    return kind(weight=random(D), bias=random(D) if bias else None, eps=eps)


@each_bias
@each_norm
def test_agrees_with_the_formula(kind: Norm, bias: bool) -> None:
    norm, x = build(kind, bias=bias), random(3, N, D)
    slow = slow_layers.layer_norm if kind is LayerNorm else slow_layers.rms_norm
    offset = None if norm.bias is None else norm.bias.numpy()
    expected = torch.stack([torch.from_numpy(slow(one.numpy(), norm.weight.numpy(), offset, norm.eps)) for one in x])
    assert_close(norm(x), expected, rtol=1e-13)
    assert_close(norm(x, torch.full((N,), 0.25, dtype=torch.float64)), expected, rtol=1e-13)
    assert isinstance(norm, TokenMap)
    assert (norm.width, norm.out_width) == (D, D)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(D),
        nn.LayerNorm(D, eps=0.1, bias=False),
        nn.LayerNorm(D, elementwise_affine=False),
        nn.RMSNorm(D, eps=0.1),
        nn.RMSNorm(D, eps=0.1, elementwise_affine=False),
        nn.RMSNorm(D, dtype=torch.float64),
    ],
    ids=str,
)
def test_reads_torch(module: Any) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm, x = normalisation_from_torch(module), random(N, D)
    with torch.no_grad():
        assert_close(norm(x), module.double()(x), rtol=1e-13)
        before = norm(x)
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert_close(norm(x), before, rtol=0.0)


def test_rms_norm_without_eps_takes_that_of_its_weights() -> None:
    norm = normalisation_from_torch(nn.RMSNorm(D))
    x = 1e-4 * random(N, D)
    assert norm.eps == torch.finfo(torch.float32).eps
    assert_close(norm(x), nn.RMSNorm(D)(x.float()).detach().double(), rtol=1e-6)


class _Louder(nn.LayerNorm):
    """Something else."""


@pytest.mark.parametrize("module", [nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3)), _Louder(D), nn.BatchNorm1d(D)], ids=str)
def test_refuses_modules(module: nn.Module) -> None:
    with refused(UnsupportedModelError, type(module).__name__):
        normalisation_from_torch(module)


@each_norm
def test_invariances(kind: Norm) -> None:
    norm, x = build(kind, eps=1e-14), random(N, D)
    assert_close(norm(1000.0 * x), norm(x), rtol=1e-11)
    if kind is LayerNorm:
        assert_close(norm(x + 3.0), norm(x), rtol=1e-11)


@each_bias
@each_norm
def test_output_radius_and_lipschitz_hold_and_are_nearly_reached(kind: Norm, bias: bool) -> None:
    for _ in range(20):
        norm = build(kind, bias=bias)
        x = random(200, D) * 10.0 ** torch.randint(-4, 5, (200, 1)).double()
        assert_at_most(float(torch.linalg.vector_norm(norm(x), dim=-1).max()), norm.output_radius.value)
        slopes = torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(norm))(x[:, None]).reshape(-1, D, D), 2)
        assert_at_most(float(slopes.max()), norm.lipschitz.value)
    plain = kind(weight=torch.ones(D), eps=0.01)
    spread = torch.tensor([[1.0, -1.0] * (D // 2)], dtype=torch.float64)
    assert float(torch.linalg.vector_norm(plain(1e6 * spread))) == pytest.approx(math.sqrt(D), rel=1e-9)
    slope = torch.linalg.vector_norm(plain(1e-6 * spread)) / torch.linalg.vector_norm(1e-6 * spread)
    assert float(slope) == pytest.approx(plain.lipschitz.value, rel=1e-9)


@each_norm
def test_refuses(kind: Norm) -> None:
    with refused(InputError, "eps"):
        kind(weight=torch.ones(D), eps=0.0)
    with shapes_unchecked(), refused(InputError, "bias must have shape"):
        kind(weight=torch.ones(D), bias=torch.ones(D + 1))
    with shapes_unchecked(), refused(InputError, "weight must have 1 dimensions"):
        kind(weight=torch.ones(2, D))
    with refused(InputError, "NaN"):
        kind(weight=torch.full((D,), torch.nan))


def test_digests_differ() -> None:
    weight = torch.ones(D)
    norms = [
        kind(weight=weight, bias=bias, eps=eps)
        for kind in (LayerNorm, RMSNorm)
        for bias in (None, torch.zeros(D))
        for eps in (0.1, 0.2)
    ]
    assert len({norm.digest for norm in norms}) == len(norms)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_refuses_a_norm_whose_call_is_another_function(kind: type[nn.LayerNorm] | type[nn.RMSNorm]) -> None:
    for size in (1.0, 1e-10):
        module = kind(D)
        nn.init.constant_(module.weight, size)
        handle = module.register_forward_hook(lambda _, __, out: 3 * out)
        with refused(UnsupportedModelError, "differs from the specification"):
            normalisation_from_torch(module)
        handle.remove()
        assert normalisation_from_torch(module).width == D
