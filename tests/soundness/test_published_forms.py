"""Published forms that fail, each with the numbers of its failure, beside the form that this package uses."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import masked_constant, mean_field_constant
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.lipschitz.at_an_input import diameter_norm_upper, local_norm_upper, softmax_norm_upper
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.numerics.transport import wasserstein
from attnrobust.tokens import TokenMeasure


def _norm(layer: Attention, points: Tensor) -> float:
    return largest_singular_value_lower(AttentionJacobian(layer, points).linear_map())[0].value


def _scalar(a: float, *, causal: bool = False) -> Attention:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Attention(w_q=one, w_k=a * one, w_v=one, scale=1.0, causal=causal)


def test_local_estimate_of_castins_code_is_not_a_bound() -> None:
    """``||V|| (max_i ||A x_i||^2 r^2 (n+1) + n)^{1/2}``: 1.414 where the norm is 100.01; the repaired forms hold."""
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # A = e1 e2^T, so A x = 0 on the line of e1
    points = torch.tensor([[10.0, 0.0], [-10.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)[None]
    layer = Attention(w_q=a.T[None], w_k=eye, w_v=eye, scale=1.0)  # score x_i A^T x_j
    torch.testing.assert_close(layer.bilinear[0], a.T)
    n, diameter = 2, 20.0
    estimate = math.sqrt(float((points @ a.T).square().sum(-1).max()) * diameter**2 * (n + 1) + n)
    truth = _norm(layer, points)
    assert estimate == pytest.approx(1.414, abs=1e-3)
    assert truth == pytest.approx(100.01, abs=1e-2)
    jacobian = AttentionJacobian(layer, points)
    for bound in (diameter_norm_upper, local_norm_upper, softmax_norm_upper):
        assert truth <= bound(jacobian).value


def test_l2_attention_bound_with_the_printed_exponent_fails_by_scaling() -> None:
    """Kim et al. 2021, l2 norm, as reported with ||W^Q||^2: 682.8 where the norm is 10^4; with ||W^Q||^4 it holds."""
    n, weight = 4, 100.0
    c = 0.6035  # the solution of c e^{c+1} = n - 1
    assert c * math.exp(c + 1) == pytest.approx(n - 1, rel=1e-3)

    def bound(exponent: float) -> float:
        return math.sqrt(n) * (4 * c + 1) * math.sqrt(weight**exponent)

    def attend(x: Tensor) -> Tensor:  # one head, width 1: P from squared distances, values times A = W^Q W^Q^T
        weights = torch.softmax(-((weight * (x - x.T)) ** 2), dim=-1)
        return weights @ x * weight**2

    truth = float(torch.linalg.matrix_norm(torch.func.jacrev(attend)(torch.zeros(n, 1).double())[:, 0, :, 0], 2))
    assert truth == pytest.approx(1e4, rel=1e-9)
    assert bound(2.0) == pytest.approx(682.8, abs=0.5)
    assert bound(2.0) < truth <= bound(4.0)


def test_unmasked_constant_fails_for_causal_attention() -> None:
    """(1 + 3a) e^{2a} = 1.068 at a = 0.0134, where 60 tokens in order already show 1.593 in d_2."""
    layer = _scalar(0.0134, causal=True)
    points = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64)[:, None]
    truth = _norm(layer, points)
    unmasked = mean_field_constant(_scalar(0.0134), 1.0, form="reported").value
    assert unmasked == pytest.approx(1.068, abs=1e-3)
    assert truth == pytest.approx(1.593, abs=1e-3)
    assert truth <= masked_constant(layer, 1.0).value


def test_moving_and_splitting_constants_do_not_bound_true_transport() -> None:
    """max(||J||, max_i ||Q_i||) = 1 at x = +-3, but a mass of 1e-6 moved from 3 to -0.5 gives a W_2 ratio of 1.633."""
    layer = _scalar(1.0)
    clean = TokenMeasure(torch.tensor([[3.0], [-3.0]], dtype=torch.float64))
    jacobian = AttentionJacobian(layer, clean.points)
    weights = jacobian.weights[0]
    mean = weights @ clean.points
    own_query = (weights @ clean.points**2 - mean**2).abs().max()
    local = max(_norm(layer, clean.points), float(own_query))
    assert local == pytest.approx(1.0, abs=1e-5)
    assert float(own_query) < 1e-6

    share = 1e-6
    moved = TokenMeasure(
        torch.tensor([[3.0], [-3.0], [-0.5]], dtype=torch.float64),
        torch.tensor([0.5 - share, 0.5, share], dtype=torch.float64),
    )
    before = TokenMeasure(layer(clean.points), clean.mass)
    after = TokenMeasure(layer(moved.points, moved.mass), moved.mass)
    ratio = wasserstein(before, after, order=2).lower.value / wasserstein(clean, moved, order=2).upper.value
    assert ratio == pytest.approx(1.633, abs=2e-3)
    assert ratio <= mean_field_constant(layer, 3.0).value
