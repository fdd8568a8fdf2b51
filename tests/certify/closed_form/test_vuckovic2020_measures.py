"""Constants of attention as an integral operator, against transport, ascent and finite differences."""

import math

import pytest
import torch

from attnrobust.certify.closed_form.castin2024_mean_field import kernel_constant, mean_field_constant
from attnrobust.certify.closed_form.vuckovic2020_measures import (
    context_constant,
    general_kernel_constant,
    misspecified_input,
)
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.contraction import contraction
from attnrobust.lipschitz.fixed_point import fixed_point
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.numerics.transport import wasserstein
from attnrobust.tokens import TokenMeasure
from tests.assertions import refused

RADIUS = 0.8
ONE = torch.ones(1, 1, 1, dtype=torch.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layers() -> dict[str, TokenMap]:
    constants = KernelConstants(diameter=2 * RADIUS, oscillation=2 * RADIUS, query_slope=1.0, key_slope=1.0)
    return {
        "dot": Attention(w_q=normal(2, 3, 2), w_k=normal(2, 3, 2), w_v=normal(2, 3, 2), w_o=normal(2, 2, 3)),
        "l2": L2Attention(w_q=0.7 * normal(2, 3, 2), w_v=normal(2, 3, 2), w_o=normal(2, 2, 3)),
        "kernel": KernelAttention(lambda x, y: -torch.cdist(x, y), "laplace", normal(3, 3), constants),
    }


def measure(n: int) -> TokenMeasure:
    points = normal(n, 3)
    points = points / torch.linalg.vector_norm(points, dim=-1, keepdim=True) * RADIUS * (1.0 - 1e-12)
    return TokenMeasure(points, torch.softmax(2.0 * normal(n), dim=0))


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("name", ["dot", "l2", "kernel"])
def test_against_transport(name: str, order: float) -> None:
    layer = layers()[name]
    rate, context = general_kernel_constant(layer, RADIUS, order=order), context_constant(layer, RADIUS, order=order)
    query = measure(1).points
    for _ in range(6):
        first, second = measure(4), measure(3)
        images = [TokenMeasure(layer(one.points, one.mass), one.mass) for one in (first, second)]
        known = misspecified_input(layer, first, second, radius=RADIUS, order=order)
        assert wasserstein(*images, order=order).lower.value <= known.outputs.value
        assert known.outputs.value == pytest.approx(rate.value * known.distance.value)
        # a query of mass 1e-300 in both contexts
        mass = [torch.cat([query.new_tensor([1e-300]), one.mass]) for one in (first, second)]
        tokens = [torch.cat([query, one.points]) for one in (first, second)]
        rows = [layer(points, weights)[0] for points, weights in zip(tokens, mass, strict=True)]
        assert float(torch.linalg.vector_norm(rows[0] - rows[1])) <= known.row.value
        assert known.row.value == pytest.approx(context.value * known.distance.value)


def test_l2_attention_against_ascent() -> None:
    """Width 1, rho = 1/2: ``1/2 + e^{1/p} (1 + kappa_p)``; ascent in W_2 comes within a factor of 6."""
    layer = L2Attention(w_q=ONE, w_v=ONE, scale=1.0)
    assert general_kernel_constant(layer, 0.5).value == pytest.approx(0.5 + math.e * 3.0)
    bound = general_kernel_constant(layer, 0.5, order=2.0).value
    assert bound == pytest.approx(0.5 + 2.0 * math.exp(0.5))
    found = lipschitz_search(layer, torch.zeros(3, 1, dtype=torch.float64), 0.5, masses="free", restarts=8, steps=60)
    assert bound / 6.0 <= found.lower.value <= bound


def test_dot_products_and_stated_kernels_have_their_known_constants() -> None:
    known = layers()
    dot, kernel = known["dot"], known["kernel"]
    assert isinstance(dot, Attention)
    assert isinstance(kernel, KernelAttention)
    expected = mean_field_constant(dot, RADIUS, order=1.0).value
    assert general_kernel_constant(dot, RADIUS).value == pytest.approx(expected)
    for order in (1.0, 2.0):
        expected = kernel_constant(kernel, order=order).value
        assert general_kernel_constant(kernel, 7.0, order=order).value == pytest.approx(expected)


def test_l2_attention_contracts_to_its_fixed_point() -> None:
    layer = L2Attention(w_q=ONE, w_v=0.1 * ONE, b_o=torch.full((1,), 0.05), scale=1.0)
    assert contraction(layer, radius=0.5, order=1).proved
    end = fixed_point(layer, TokenMeasure(torch.tensor([[0.5], [-0.3]])), radius=0.5, order=1)
    assert float(end.tokens[1]) == pytest.approx(0.05 / 0.9)  # x = 0.1 x + 0.05
    assert end.measured_rate.value <= end.rate.value


def test_refusals() -> None:
    with refused(UnsupportedModelError, "mask"):
        general_kernel_constant(L2Attention(w_q=ONE, w_v=ONE, causal=True), 1.0)
    with refused(UnsupportedModelError, "CosineAttention"):
        general_kernel_constant(CosineAttention(w_q=ONE, w_k=ONE, w_v=ONE), 1.0)
    with refused(InputError, "order"):
        general_kernel_constant(L2Attention(w_q=ONE, w_v=ONE), 1.0, order=0.5)
    far = TokenMeasure(torch.tensor([[3.0]]))
    with refused(InputError, "outside"):
        misspecified_input(L2Attention(w_q=ONE, w_v=ONE), far, far, radius=1.0)
