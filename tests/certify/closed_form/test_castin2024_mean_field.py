"""Mean-field constants against exact local constants of weighted measures and against exact transport distances."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import kernel_constant, masked_constant, mean_field_constant
from attnrobust.certify.closed_form.castin2024_smooth import ball_constant, large_radius_limit
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.rotary import Rotary
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.numerics.transport import wasserstein
from attnrobust.tokens import TokenMeasure
from tests.cases import case_named


def _scalar(a: float, *, causal: bool = False, offset: float = 0.0) -> Attention:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    bias = torch.full((1, 1), offset, dtype=torch.float64)
    return Attention(w_q=one, w_k=a * one, w_v=one, b_q=bias / a if a else None, scale=1.0, causal=causal)


def _local_constant(a: float, offset: float, x: Tensor, mass: Tensor, order: float) -> Tensor:
    """Exact W_p-local constant of moving atoms, d = 1: the L^p(mass) operator norm of the derivative (b, n, n)."""
    scores = x[:, :, None] * a * x[:, None, :] + offset * x[:, None, :] + mass.log()[:, None, :]
    weights = torch.softmax(scores, dim=-1)
    mean = (weights * x[:, None, :]).sum(-1)
    variance = (weights * x[:, None, :] ** 2).sum(-1) - mean**2
    gradient = a * x[:, :, None] + offset
    jacobian = weights * (1 + (x[:, None, :] - mean[:, :, None]) * gradient) + torch.diag_embed(variance * a)
    if order == 2:
        root = mass.sqrt()
        return torch.linalg.matrix_norm(root[:, :, None] * jacobian / root[:, None, :], 2)
    if order == 1:
        return ((mass[:, :, None] * jacobian.abs()).sum(dim=1) / mass).amax(dim=-1)
    return jacobian.abs().sum(dim=-1).amax(dim=-1)


def _largest_local(a: float, radius: float, order: float, *, offset: float = 0.0, atoms: int = 3) -> float:
    """Ascent over positions and masses of a few atoms."""
    generator = torch.Generator().manual_seed(0)
    x = (radius * (2 * torch.rand(120, atoms, generator=generator, dtype=torch.float64) - 1)).requires_grad_()
    logits = (3 * torch.randn(120, atoms, generator=generator, dtype=torch.float64)).requires_grad_()
    optimiser = torch.optim.Adam([x, logits], lr=0.05 * max(radius, 1.0))
    best = 0.0
    for _ in range(250):
        value = _local_constant(a, offset, x.clamp(-radius, radius), torch.softmax(logits, -1), order)
        best = max(best, float(value.detach().max()))
        optimiser.zero_grad()
        (-value.clamp_min(1e-12).log().sum()).backward()
        optimiser.step()
    return best


@pytest.mark.parametrize(
    ("order", "a", "size", "least", "most"),
    [
        (2.0, -1.0, 0.25, 1.8, 2.0),
        (2.0, -1.0, 1.0, 2.0, 2.2),
        (2.0, -1.0, 4.0, 1.6, 1.8),
        (2.0, 1.0, 0.25, 1.4, 1.6),
        (2.0, 1.0, 2.0, 6.0, 7.5),
        (1.0, -1.0, 0.25, 1.0, 1.2),
        (1.0, -1.0, 1.0, 1.0, 1.2),
        (math.inf, -1.0, 1.0, 1.0, 1.6),
        (math.inf, -1.0, 2.0, 1.0, 1.6),
    ],
)
@pytest.mark.one_in(2)
def test_derived_constant_against_ascent(order: float, a: float, size: float, least: float, most: float) -> None:
    radius = math.sqrt(size)
    found = _largest_local(a, radius, order)
    derived = mean_field_constant(_scalar(a), radius, order=order).value
    assert found <= derived
    assert derived <= mean_field_constant(_scalar(a), radius, order=order, form="reported").value
    assert least <= derived / found <= most


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_query_bias_is_inside(order: float) -> None:
    found = _largest_local(-1.0, 1.0, order, offset=0.8)
    assert found <= mean_field_constant(_scalar(-1.0, offset=0.8), 1.0, order=order).value
    if order == 1.0:  # without the bias term the constant would be wrong
        assert found > mean_field_constant(_scalar(-1.0), 1.0, order=order).value


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_against_exact_transport(order: float) -> None:
    """Different numbers of atoms, several heads, biases: distances of inputs and outputs by linear programs."""
    layer = case_named("biases-12-heads").attention
    generator = torch.Generator().manual_seed(2)
    constant = mean_field_constant(layer, 1.0, order=order).value
    for _ in range(12):
        measures = []
        for n in torch.randint(1, 6, (2,), generator=generator).tolist():
            points = torch.randn(n, layer.width, generator=generator, dtype=torch.float64)
            points = points / torch.linalg.vector_norm(points, dim=-1, keepdim=True)
            measures.append(
                TokenMeasure(points, torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0))
            )
        images = [TokenMeasure(layer(m.points, m.mass), m.mass) for m in measures]
        moved = wasserstein(*images, order=order).lower.value
        assert moved <= constant * wasserstein(*measures, order=order).upper.value


def test_closed_forms() -> None:
    layer = case_named("concatenated-biases-one-head").attention
    radius = 0.6
    norm = float(torch.linalg.matrix_norm(layer.bilinear[0], 2))
    a, v = norm * radius**2, float(torch.linalg.matrix_norm(layer.w_v[0], 2))
    a_c = radius * (norm * radius + float(torch.linalg.vector_norm(layer.key_offset[0])))
    expected = {
        1.0: v * (a + math.exp(2 * a_c) * (1 + 2 * a_c)),
        2.0: v * (a + math.exp(a_c) * (1 + a_c)),
        math.inf: v * (1 + a + a_c),
    }
    for order, value in expected.items():
        assert mean_field_constant(layer, radius, order=order).value == pytest.approx(value, rel=1e-9)
        reported = mean_field_constant(layer, radius, order=order, form="reported").value
        assert reported == pytest.approx(v * (1 + 3 * a_c) * math.exp(2 * a_c), rel=1e-9)


def test_overflow_says_nothing() -> None:
    assert mean_field_constant(_scalar(1.0), 1e3).value == math.inf


# ---- causal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "size"), [(0.0, 1.0), (-1.0, 0.25), (-1.0, 1.0), (1.0, 1.0)])
def test_masked_constant_against_ascent(a: float, size: float) -> None:
    """Tokens in order with equal masses: d_2 is the Frobenius norm over sqrt(n), the constant does not depend on n."""
    layer, radius = _scalar(a, causal=True), math.sqrt(size)
    bound = masked_constant(layer, radius).value
    for n in (2, 12, 40):
        x = (radius * (2 * torch.rand(n, 1, dtype=torch.float64) - 1)).requires_grad_()
        best = 0.0
        for _ in range(25):
            jacobian = torch.func.jacrev(layer)(x)[:, 0, :, 0]
            norm = torch.linalg.matrix_norm(jacobian, 2)
            best = max(best, float(norm.detach()))
            gradient = torch.autograd.grad(norm, x, allow_unused=True)[0]
            if gradient is None or float(gradient.abs().max()) == 0.0:
                break
            x = (x.detach() + 0.2 * radius * gradient / gradient.abs().max()).clamp(-radius, radius).requires_grad_()
        assert best <= bound


def test_masked_constant_with_masses() -> None:
    layer = case_named("causal-masses").attention
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        points = torch.nn.functional.normalize(torch.randn(7, 4, generator=generator, dtype=torch.float64), dim=-1)
        mass = torch.softmax(3 * torch.randn(7, generator=generator, dtype=torch.float64), 0)
        matrix = AttentionJacobian(layer, points, mass).linear_map().dense()
        root = mass.sqrt()
        weighted = root.repeat_interleave(4)[:, None] * matrix / root.repeat_interleave(4)
        assert float(torch.linalg.matrix_norm(weighted, 2)) <= masked_constant(layer, 1.0).value


def test_cesaro_averages_need_hardys_factor() -> None:
    """A = 0: the causal layer averages what came before; its norm tends to 2, which the constant gives exactly."""
    layer = _scalar(0.0, causal=True)
    norms = [
        largest_singular_value_lower(AttentionJacobian(layer, torch.zeros(n, 1).double()).linear_map())[0].value
        for n in (2, 10, 100, 1000)
    ]
    assert norms == pytest.approx([1.144, 1.410, 1.630, 1.748], abs=1e-3)
    assert masked_constant(layer, 1.0).value == pytest.approx(2.0, rel=1e-6)


# ---- other constants -----------------------------------------------------------------------------------------------


def _distance_scores(x: Tensor, y: Tensor) -> Tensor:
    return -torch.cdist(x, y)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_kernel_constant_against_transport(order: float) -> None:
    """Laplace kernel on the unit ball: oscillation at most 2, both slopes 1."""
    constants = KernelConstants(diameter=2.0, oscillation=2.0, query_slope=1.0, key_slope=1.0)
    layer = KernelAttention(_distance_scores, "laplace", torch.eye(2, dtype=torch.float64), constants=constants)
    bound = kernel_constant(layer, order=order).value
    kappa = 2.0 if order == 1.0 else 1.0
    assert bound == pytest.approx(1.0 + math.exp(2.0 / order) * (1.0 + kappa), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        points = torch.nn.functional.normalize(torch.randn(2, 4, 2, generator=generator, dtype=torch.float64), dim=-1)
        first, second = (TokenMeasure(p) for p in points)
        images = [TokenMeasure(layer(m.points)) for m in (first, second)]
        moved = wasserstein(*images, order=order).lower.value
        assert moved <= bound * wasserstein(first, second, order=order).upper.value
    with pytest.raises(InputError, match="not known"):
        kernel_constant(KernelAttention(_distance_scores, "laplace", torch.eye(2, dtype=torch.float64)))


def test_large_radius_limit() -> None:
    """The norm rises above the limit sqrt(3) before it falls to it: nothing is claimed in between."""
    points = torch.tensor([[1.0], [2.0], [0.5], [-0.3]], dtype=torch.float64)
    layer = _scalar(1.0)
    limit = large_radius_limit(layer, points).value
    assert limit == pytest.approx(math.sqrt(3.0), rel=1e-9)
    norms = [
        largest_singular_value_lower(AttentionJacobian(layer, s * points).linear_map())[0].value
        for s in (2.0, 10.0, 30.0)
    ]
    assert norms[0] > 1.3 * limit
    assert norms[1] == pytest.approx(limit, rel=1e-6)
    assert norms[2] == pytest.approx(limit, rel=1e-9)
    with pytest.raises(InputError, match="tie"):
        large_radius_limit(layer, torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(InputError, match="query bias"):
        large_radius_limit(_scalar(1.0, offset=0.5), points)


def test_refusals() -> None:
    masked = case_named("finite-mask").attention
    causal = case_named("causal").attention
    with pytest.raises(InputError, match="mask"):
        mean_field_constant(masked, 1.0)
    with pytest.raises(InputError, match="mask"):
        masked_constant(masked, 1.0)
    with pytest.raises(InputError, match="masked_constant"):
        mean_field_constant(causal, 1.0)
    with pytest.raises(InputError, match="not causal"):
        masked_constant(_scalar(1.0), 1.0)
    with pytest.raises(InputError, match="order p >= 1"):
        mean_field_constant(_scalar(1.0), 1.0, order=0.5)


def test_measures_cost_more_than_tokens() -> None:
    """The measure constant also covers few tokens: for moderate a it is below sqrt(n) bounds of many tokens."""
    layer = _scalar(-1.0)
    assert mean_field_constant(layer, 0.5).value < ball_constant(layer, 100, 0.5).value


@pytest.mark.parametrize(
    "changes", [{"head_bias": HeadBias(slopes=torch.ones(1))}, {"window_left": 1}, {"rotary": Rotary(torch.ones(1))}]
)
def test_places_make_no_map_of_measures(changes: dict[str, Any]) -> None:
    """The order of the tokens counts there, so no constant holds for measures."""
    weight = torch.ones(1, 2, 2, dtype=torch.float64)
    layer = Attention(weight, weight, weight, **changes)
    with pytest.raises(UnsupportedModelError, match="no map of token measures"):
        mean_field_constant(layer, 1.0)
    with pytest.raises(UnsupportedModelError, match="no map of token measures"):
        masked_constant(replace(layer, causal=True), 1.0)
