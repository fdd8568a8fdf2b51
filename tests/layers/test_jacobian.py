"""The closed-form derivative against automatic differentiation, on every case and on a pretrained layer."""

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import largest_singular_value_lower, largest_singular_value_upper, transpose
from tests.cases import Case, case_named
from tests.pretrained import minilm_layer


def _mass(case: Case) -> Tensor | None:
    return None if case.tokens.uniform else case.tokens.mass


def _autograd(case: Case) -> Tensor:
    jacobian = torch.func.jacrev(lambda x: case.attention(x, _mass(case)))(case.tokens.points)
    return jacobian.flatten(0, 1).flatten(1)


def _jacobian(case: Case) -> AttentionJacobian:
    return AttentionJacobian(case.attention, case.tokens.points, _mass(case))


def test_products_agree_with_autograd(case: Case) -> None:
    truth = _autograd(case)
    linear = _jacobian(case).linear_map()
    size = max(1.0, float(truth.abs().max()))
    torch.testing.assert_close(linear.dense(), truth, rtol=0, atol=1e-10 * size)
    torch.testing.assert_close(transpose(linear).dense().T, truth, rtol=0, atol=1e-10 * size)


@pytest.mark.one_in(4)
def test_singular_values_agree_with_the_dense_matrix(every_case: Case) -> None:
    truth = float(torch.linalg.matrix_norm(_autograd(every_case), 2))
    linear = _jacobian(every_case).linear_map()
    noise = 1e-12 * max(1.0, truth)  # autograd leaves 1e-17 where the derivative is exactly zero
    assert largest_singular_value_lower(linear)[0].value == pytest.approx(truth, rel=1e-8, abs=noise)
    for options in ({}, {"dense_limit": 0}):
        upper = largest_singular_value_upper(linear, **options).value
        assert truth - noise <= upper <= truth * (1 + 1.1e-3)


def test_pooled_restricted_and_scaled(case: Case) -> None:
    truth, n = _autograd(case), case.n
    pool, scale = torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    movable = torch.zeros(n, dtype=torch.bool)
    movable[[0, n // 2]] = True
    width, out = case.attention.width, case.attention.out_width
    expected = torch.einsum("n,nemd->emd", pool, (truth.reshape(n, out, n, width) * scale[:, None]))[:, movable]
    linear = _jacobian(case).linear_map(pool=pool, movable=movable, token_scale=scale)
    assert linear.in_shape == (int(movable.sum()), width)
    torch.testing.assert_close(
        linear.dense(), expected.flatten(1), rtol=0, atol=1e-9 * max(1.0, float(truth.abs().max()))
    )


def test_batched_inputs_and_directions() -> None:
    case = case_named("finite-mask-masses")
    points = torch.randn(3, case.n, case.attention.width, dtype=torch.float64)
    mass = torch.softmax(torch.randn(3, case.n, dtype=torch.float64), -1)
    v = torch.randn(5, 3, case.n, case.attention.width, dtype=torch.float64)
    batched = AttentionJacobian(case.attention, points, mass)
    for b in range(3):
        single = AttentionJacobian(case.attention, points[b], mass[b])
        torch.testing.assert_close(batched.matvec(v)[:, b], single.matvec(v[:, b]))
        u = batched.matvec(v)
        torch.testing.assert_close(batched.rmatvec(u)[:, b], single.rmatvec(u[:, b]))
        torch.testing.assert_close(batched.matvec(v[0, 0])[b], single.matvec(v[0, 0]))
    with pytest.raises(InputError, match="not a batch"):
        batched.linear_map()


def test_no_graph_is_built() -> None:
    case = case_named("biases")
    points = case.tokens.points.clone().requires_grad_()
    image = AttentionJacobian(case.attention, points).matvec(points)
    assert not image.requires_grad


def test_unusable_tokens_are_refused() -> None:
    case = case_named("biases")
    with pytest.raises(InputError, match="must have shape"):
        AttentionJacobian(case.attention, case.tokens.points[:, :2])
    with pytest.raises(InputError, match="not finite"):
        AttentionJacobian(case.attention, case.tokens.points * 1e200)


def _autograd_norm(layer: Attention, points: Tensor) -> float:
    """Largest singular value by ARPACK through torch's own forward and reverse differentiation."""
    n, d = points.shape

    def product(flat: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(flat.copy()).reshape(n, d)
        with warnings.catch_warnings():  # torch's own jvp loads a deprecated compiler at its first call
            warnings.simplefilter("ignore", DeprecationWarning)
            tangent = torch.func.jvp(layer, (points,), (v,))[1]  # (output, tangent)
        pullback = torch.func.vjp(layer, points)[1]
        return pullback(tangent)[0].reshape(-1).numpy()

    start = np.random.default_rng(0).standard_normal(n * d)
    operator = LinearOperator((n * d, n * d), matvec=product, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-10)[0][0]) ** 0.5


@pytest.mark.parametrize("index", [0, 3, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 4, 5))])
def test_pretrained_layers_agree_with_arpack_through_autograd(index: int) -> None:
    """Attention without output projection on real text, n = 64."""
    layer, points = minilm_layer(index, 64)
    truth = _autograd_norm(layer, points)
    linear = AttentionJacobian(layer, points).linear_map()
    assert largest_singular_value_lower(linear)[0].value == pytest.approx(truth, rel=1e-6)
    upper = largest_singular_value_upper(linear, tol=1e-4)
    assert truth <= upper.value <= truth * (1 + 2e-4)
    assert upper.failure_probability == 1e-9
