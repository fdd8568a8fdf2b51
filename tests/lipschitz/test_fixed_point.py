"""Contractions: proved rates against measured ones, fixed points, inverses, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.kim2021_l2 import derived_constant
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.contraction import contraction
from attnrobust.lipschitz.fixed_point import fixed_point
from attnrobust.lipschitz.invertible import ContractiveResidual
from attnrobust.numerics.sides import Upper
from attnrobust.numerics.transport import wasserstein
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, refused

ORDERS = (1, 2, math.inf)


class Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def small_layer(seed: int, *, scale: float = 0.04, biases: bool = True) -> Attention:
    draw = Draw(seed)
    return Attention(
        w_q=draw(2, 3, 2, scale=0.3),
        w_k=draw(2, 3, 2, scale=0.3),
        w_v=draw(2, 3, 2, scale=scale),
        b_q=draw(2, 2, scale=0.2) if biases else None,
        b_v=draw(2, 2, scale=0.1) if biases else None,
        w_o=draw(2, 2, 3),
        b_o=draw(3, scale=0.1) if biases else None,
    )


def in_ball(points: Tensor, radius: float) -> Tensor:
    return points * (radius / torch.linalg.vector_norm(points, dim=-1, keepdim=True)).clamp_max(1.0)


def l2_layer(seed: int, *, heads: int = 8, width: int = 64, key: int = 8) -> L2Attention:
    draw, into = Draw(seed), width**-0.5
    return L2Attention(
        w_q=draw(heads, width, key, scale=into),
        w_v=draw(heads, width, key, scale=into),
        w_o=draw(heads, key, width, scale=into),
    )


# ---- infinite depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_deep_stacks_forget_their_input_at_the_proved_rate(order: float) -> None:
    """Two inputs of different masses come together in exact W_p as fast as promised, and meet in one point."""
    radius, met = 1.0, 0
    for seed in range(12):
        layer, draw = small_layer(seed), Draw(100 + seed)
        known = contraction(layer, radius=radius, order=order)
        if not known.proved:
            continue
        met += 1
        first = TokenMeasure(in_ball(draw(4, 3), radius), torch.softmax(draw(4, scale=2.0), dim=0))
        second = TokenMeasure(in_ball(draw(3, 3), radius))
        q, start = known.rate.value, wasserstein(first, second, order=order).upper.value
        x, y = first.points, second.points
        for depth in range(1, 5):
            x, y = layer(x, first.mass), layer(y)
            assert float(torch.linalg.vector_norm(x, dim=-1).max()) <= known.image_radius.value
            apart = wasserstein(TokenMeasure(x, first.mass), TokenMeasure(y), order=order).lower.value
            assert_at_most(apart, q**depth * start + 1e-14)
        end = fixed_point(layer, first, radius=radius, order=order, tolerance=1e-9)
        assert end.reached
        assert end.error.value <= 1e-9
        assert end.iterations <= end.certified_iterations
        assert end.measured_rate.value <= q
        # the only fixed point is one token that maps to itself
        again = layer(end.tokens, first.mass)
        assert_close(again, end.tokens, rtol=0, atol=1e-8)
        assert_close(end.tokens, end.tokens[:1].expand(4, 3), rtol=0, atol=1e-8)
        other = fixed_point(layer, second, radius=radius, order=order, tolerance=1e-9)
        assert_close(other.tokens[:1], end.tokens[:1], rtol=0, atol=1e-8)
    assert met >= 3


def test_iterations_are_what_the_rate_needs() -> None:
    layer = small_layer(0)
    known = contraction(layer, radius=1.0, order=2)
    k = known.iterations(1e-6)
    assert known.rate.value**k * 2.0 <= 1e-6 < known.rate.value ** (k - 1) * 2.0
    assert known.iterations(3.0) == 0


def test_sigmoid_attention_contracts_without_an_exponential() -> None:
    draw = Draw(3)
    layer = SigmoidAttention(
        w_q=draw(1, 2, 2), w_k=draw(1, 2, 2), w_v=draw(1, 2, 2, scale=0.05), b_o=draw(2, scale=0.1)
    )
    clean = TokenMeasure(in_ball(draw(5, 2), 2.0))
    known = contraction(layer, radius=2.0, order=1)
    assert known.proved
    end = fixed_point(layer, clean, radius=2.0, order=1)
    assert end.measured_rate.value <= known.rate.value
    assert_close(layer(end.tokens), end.tokens, rtol=0, atol=1e-8)


def test_a_layer_that_is_no_contraction_is_refused() -> None:
    layer = small_layer(0, scale=3.0)
    known = contraction(layer, radius=1.0)
    assert not known.proved
    clean = TokenMeasure(torch.zeros(2, 3).double())
    with refused(InputError, "no contraction is proved"):
        fixed_point(layer, clean, radius=1.0)
    with refused(InputError, "no contraction is proved"):
        known.iterations(1e-3)
    with refused(InputError, "outside of the ball"):
        fixed_point(small_layer(0), TokenMeasure(torch.full((1, 3), 9.0).double()), radius=1.0)
    with refused(UnsupportedModelError, "mask"):
        contraction(Attention(w_q=layer.w_q, w_k=layer.w_k, w_v=layer.w_v, w_o=layer.w_o, causal=True), radius=1.0)
    with refused(UnsupportedModelError, "width 3 to 4"):
        contraction(Attention(w_q=layer.w_q, w_k=layer.w_k, w_v=layer.w_v), radius=1.0)
    with refused(InputError, "radius must be a positive number; got 0.0"):
        contraction(layer, radius=0.0)


# ---- inverses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_invertible_l2_attention_at_full_size(share: float) -> None:
    """n = 64, d = 64, 8 heads: the inverse comes back to 1e-10, within the certified iterations."""
    tokens = Draw(1)(64, 64)
    layer = ContractiveResidual.of_l2(l2_layer(0), tokens=64, share=share)
    result = layer.inverse(layer(tokens), tolerance=1e-11)
    error = float(torch.linalg.vector_norm(result.tokens - tokens))
    assert error < 1e-10
    assert error <= result.error.value + 1e-12
    assert result.iterations <= result.certified_iterations
    assert result.measured_rate.value <= share


def test_the_measured_rate_reaches_the_certified_one() -> None:
    """One token: the layer is linear, g is the share times a rotation, and every step shrinks by exactly the share."""
    eye = torch.eye(2).double()[None]
    layer = L2Attention(w_q=eye, w_v=torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]).double(), scale=1.0)
    residual = ContractiveResidual.of_l2(layer, tokens=1, share=0.7)
    x = torch.tensor([[1.0, 2.0]]).double()
    result = residual.inverse(residual(x), tolerance=1e-8)
    assert 0.7 * (1 - 1e-8) <= result.measured_rate.value <= 0.7
    assert abs(result.iterations - result.certified_iterations) <= 1
    assert float(torch.linalg.vector_norm(result.tokens - x)) <= 1e-8


@pytest.mark.parametrize("seed", range(6))
def test_the_constant_holds_on_random_and_extreme_tokens(seed: int) -> None:
    """Frobenius ratios of pairs of inputs, near and far, never exceed it; one token at 0 and others at +-t are hard."""
    draw = Draw(seed)
    layer = l2_layer(seed, heads=2, width=3, key=2)
    bound = derived_constant(layer, 6).value
    for size in (0.01, 1.0, 30.0):
        for n in (1, 3, 6):
            x = draw(n, 3, scale=size)
            if n == 6:
                t = draw(1, 3)
                x = torch.cat([0 * t, t.expand(3, 3), -t.expand(2, 3)]) * size
            h = draw(n, 3, scale=size * 10 ** float(draw(1)))
            ratio = torch.linalg.vector_norm(layer(x + h) - layer(x)) / torch.linalg.vector_norm(h)
            assert_at_most(float(ratio), bound)


def test_what_rounding_hides_is_not_called_reached() -> None:
    """Entries of 1e6 are rounded to 1e-10: an error of 1e-13 is not claimed, and the distance is inside the error."""
    layer = l2_layer(1, heads=2, width=4, key=2)
    residual, x = ContractiveResidual.of_l2(layer, tokens=5, share=0.5), 1e6 * Draw(6)(5, 4)
    result = residual.inverse(residual(x), tolerance=1e-13)
    assert not result.reached
    assert float(torch.linalg.vector_norm(result.tokens - x)) <= result.error.value
    assert residual.inverse(residual(x), tolerance=1e-6).reached


def test_equilibria_depend_on_the_injected_input() -> None:
    draw = Draw(5)
    residual = ContractiveResidual.of_l2(l2_layer(5, heads=2, width=4, key=2), tokens=5, share=0.8)
    x = draw(5, 4)
    result = residual.equilibrium(x, tolerance=1e-11)
    assert_close(x + residual.branch(result.tokens), result.tokens, rtol=0, atol=1e-11)
    assert float(torch.linalg.vector_norm(result.tokens - x)) > 0
    assert result.iterations <= result.certified_iterations


def test_bad_residuals_are_refused() -> None:
    layer = l2_layer(0, heads=1, width=2, key=2)
    good = ContractiveResidual.of_l2(layer, tokens=2)
    with refused(InputError, "share"):
        ContractiveResidual(layer, Upper(1.0), 1.0, 2)
    with refused(InputError, "deterministic"):
        ContractiveResidual(layer, Upper(1.0, 1e-9), 0.5, 2)
    with refused(InputError, "deterministic"):
        ContractiveResidual(layer, Upper(math.inf), 0.5, 2)
    with refused(InputError, "at most 2 tokens"):
        good(Draw(0)(3, 2))
    with refused(InputError, "equal mass"):
        good(Draw(0)(2, 2), torch.tensor([0.3, 0.7]).double())
    with refused(InputError, "tolerance"):
        good.inverse(Draw(0)(2, 2), tolerance=0.0)
    assert good.digest != ContractiveResidual.of_l2(layer, tokens=2, share=0.5).digest
