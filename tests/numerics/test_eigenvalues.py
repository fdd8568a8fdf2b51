"""Eigenvalue bounds against the dense matrix, with coefficients of any size."""

import math

import pytest
import torch

from attnrobust.numerics.eigenvalues import gram_eigenvalue, spread_eigenvalue
from tests.stress import Draw

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_spread_eigenvalue_against_the_dense_matrix(seed: int, sharpness: float) -> None:
    """Below and above the largest coefficient; a weight near 1 (sharpness 30) moves the eigenvalue below it."""
    draw = Draw(seed)
    for n in range(1, 10):
        a = draw.normal(n).abs() * 10 ** draw.normal(n)
        if n % 4 == 0:
            a[:2] = a.max()  # two equal largest coefficients
        w = torch.softmax(sharpness * draw.normal(n), 0)
        movable = (torch.rand(n, generator=draw.generator) < 0.7).double()
        movable[0] = 1.0
        for lengths in (movable, movable * 10 ** (0.5 * draw.normal(n))):
            vectors = (torch.eye(n, dtype=torch.float64) - w) * lengths
            exact = float(torch.linalg.eigvalsh((vectors * a[:, None]).T @ vectors)[-1])
            found = float(spread_eigenvalue(a, w, lengths))
            rounding = 1e-15 * float(a.sum() * lengths.max() ** 2)
            assert exact * (1.0 - 1e-12) - rounding <= found <= exact * 1.01 + 1e-12 + 1e3 * rounding


def test_spread_eigenvalue_covers_the_rounding_of_saturated_weights() -> None:
    """A weight that rounds to 1: ``1 - w`` may be 1e-17 and matters beside a coefficient of 1e200."""
    a, w = torch.tensor([1e200, 1.0]).double(), torch.tensor([1.0, 1e-17]).double()
    assert float(spread_eigenvalue(a, w, torch.ones(2).double())) >= 1e200 * 1e-34


@pytest.mark.parametrize("n", [3, 24, 40])
def test_gram_eigenvalue_bounds_from_above(n: int) -> None:
    draw = Draw(n)
    vectors = draw.normal(5, n, 7)
    c = draw.normal(5, n).abs()
    exact = torch.linalg.eigvalsh((vectors * c[..., None]).mT @ vectors)[:, -1]
    found = gram_eigenvalue(vectors @ vectors.mT, c)
    assert bool((found >= exact).all())
    assert bool((found <= exact * n ** (1 / 16) * 1.001).all())


def test_gram_eigenvalue_of_coefficients_that_overflow_is_infinite() -> None:
    """Finite coefficients whose products with the Gram entries are not: a decomposition would raise."""
    gram, c = torch.eye(4, dtype=torch.float64).mul(1e4)[None], torch.tensor([[1e305, 1.0, 1.0, 0.0]]).double()
    assert math.isinf(float(gram_eigenvalue(gram, c)))
