"""Constants of the softmax derivative against eigenvalues and difference quotients."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.numerics.softmax import derivative_norm_upper


def _weights(count: int, n: int) -> Tensor:
    spread = torch.logspace(-2, 2.5, count, dtype=torch.float64)[:, None]
    return torch.softmax(spread * torch.randn(count, n, dtype=torch.float64), dim=-1)


HALF = 0.5  # Lipschitz constant of the softmax in every l_r norm (Nair 2025, arXiv 2510.23012)


def _below(weights: Tensor) -> Tensor:
    """``p_1 (1 - p_1 + p_n)``, a lower bound of the norm for two or more weights (section 7 of the literature page)."""
    top, least = weights.amax(dim=-1), weights.amin(dim=-1)
    return top * (1.0 - top + least) if weights.shape[-1] > 1 else torch.zeros_like(top)


def _norm(weights: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(torch.diag_embed(weights) - weights[..., :, None] * weights[..., None, :])[..., -1]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_both_sides_of_the_norm(n: int) -> None:
    weights = _weights(400, n)
    truth, upper, lower = _norm(weights), derivative_norm_upper(weights), _below(weights)
    assert bool((lower <= truth + 1e-15).all())
    assert bool((truth <= upper + 1e-15).all())
    assert bool((upper <= HALF + 1e-15).all())


def test_attained_at_one_peak_and_an_even_rest() -> None:
    for n, peak in ((2, 0.5), (5, 0.3), (5, 0.9), (300, 0.1)):
        weights = torch.full((n,), (1 - peak) / (n - 1), dtype=torch.float64)
        weights[n // 2] = peak
        truth = float(_norm(weights))
        assert float(derivative_norm_upper(weights)) == pytest.approx(truth, rel=1e-12)
        assert float(_below(weights)) == pytest.approx(truth, rel=1e-12)


def test_saturated_rows_keep_their_digits() -> None:
    weights = torch.softmax(torch.tensor([100.0, 0.0, -3.0], dtype=torch.float64), dim=0)
    expected = math.exp(-100.0) * (2.0 + math.exp(-3.0))
    assert float(derivative_norm_upper(weights)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("n", [2, 5, 50])
def test_half_in_every_norm(order: float, n: int) -> None:
    """No difference quotient exceeds 1/2; at (log(n-1), 0, ..., 0) the l1 and l_inf slopes attain it."""
    first, second = 3 * torch.randn(2, 500, n, dtype=torch.float64)
    second[::2] = first[::2] + 1e-4 * second[::2]
    change = torch.linalg.vector_norm(torch.softmax(first, -1) - torch.softmax(second, -1), ord=order, dim=-1)
    move = torch.linalg.vector_norm(first - second, ord=order, dim=-1)
    assert bool((change <= HALF * move).all())
    weights = torch.softmax(torch.tensor([math.log(n - 1)] + [0.0] * (n - 1), dtype=torch.float64), dim=0)
    derivative = torch.diag(weights) - weights[:, None] * weights
    if order in (1.0, math.inf):
        assert float(torch.linalg.matrix_norm(derivative, ord=order)) == pytest.approx(HALF, rel=1e-12)
