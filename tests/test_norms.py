"""Deterministic spectral norm bounds against exact values."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.norms import SpectralNorm, spectral_norm_gram, spectral_norm_svd
from attnrobust.results import Kind
from tests.assertions import assert_at_most, refused, shapes_unchecked

Bound = Callable[[Tensor], SpectralNorm]
BOUNDS: tuple[Bound, ...] = (spectral_norm_svd, spectral_norm_gram)


def exact_norm_2x2(rows: list[list[float]]) -> Decimal:
    """Largest singular value of a 2 x 2 matrix to 60 digits: s^2 = (t + sqrt(t^2 - 4 det^2)) / 2, t = ||A||_F^2."""
    with localcontext() as context:
        context.prec = 400
        (a, b), (c, d) = ((Decimal(x) for x in row) for row in rows)
        t, det = a * a + b * b + c * c + d * d, a * d - b * c
        return ((t + max(t * t - 4 * det * det, Decimal(0)).sqrt()) / 2).sqrt()


@pytest.mark.parametrize("bound", BOUNDS)
@given(entries=st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=4, max_size=4))
def test_never_below_the_exact_norm_of_a_small_matrix(bound: Bound, entries: list[float]) -> None:
    rows = [entries[:2], entries[2:]]
    value = bound(torch.tensor(rows, dtype=torch.float64)).value
    exact = exact_norm_2x2(rows)
    assert Decimal(value) >= exact
    assert value <= float(exact) * (1 + 1e-3) + 1e-300  # 2^(1/2048) for the Gram iteration


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_sizes_far_from_one_neither_overflow_nor_vanish(bound: Bound, size: float) -> None:
    matrix = size * torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert_at_most(5.0 * size, bound(matrix).value)
    assert bound(matrix).value == pytest.approx(5.0 * size, rel=1e-3)


def test_gram_iteration_charges_what_its_products_lose() -> None:
    # Every square of the tail is under half a unit in the last place of the running sum, so it is lost entirely.
    tail = 2.0**-26.2
    column = torch.cat([torch.ones(64), torch.full((200_000,), tail)]).to(torch.float64)[:, None]
    with localcontext() as context:
        context.prec = 60
        exact = (64 + 200_000 * Decimal(float(column[-1, 0])) ** 2).sqrt()
    assert Decimal(spectral_norm_gram(column, squarings=1).value) >= exact


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (12, 5), (5, 12), (96, 96)])
def test_every_shape_agrees_with_the_singular_values(bound: Bound, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    value = bound(matrix).value
    assert_at_most(float(torch.linalg.svdvals(matrix)[0]), value)
    assert value <= float(torch.linalg.svdvals(matrix)[0]) * min(shape) ** (1 / 2048) * (1 + 1e-9)


def test_gram_iteration_comes_closer_with_every_squaring() -> None:
    matrix = torch.eye(64, dtype=torch.float64)  # the slowest case: all singular values are equal
    values = [spectral_norm_gram(matrix, squarings=k).value for k in range(8)]
    for k, value in enumerate(values):
        assert value == pytest.approx(64 ** (1 / 2 ** (k + 1)), rel=1e-9)


@pytest.mark.parametrize("bound", BOUNDS)
def test_zero_matrix_is_exact(bound: Bound) -> None:
    assert bound(torch.zeros(3, 2, dtype=torch.float64)).value == 0.0


@pytest.mark.parametrize("bound", BOUNDS)
def test_every_result_says_its_kind(bound: Bound) -> None:
    result = bound(torch.eye(2, dtype=torch.float64))
    assert isinstance(result, SpectralNorm)
    assert result.kind is Kind.FLOAT64
    assert result.upper.failure_probability == 0.0
    assert result.method


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bound: Bound, bad: float) -> None:
    with refused(InputError, "NaN or infinite"):
        bound(torch.tensor([[1.0, bad]], dtype=torch.float64))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", [torch.ones(3, dtype=torch.float64), torch.ones(0, 2, dtype=torch.float64)])
def test_what_is_not_a_matrix_is_refused(bound: Bound, value: Tensor) -> None:
    with shapes_unchecked(), refused(InputError, "needs a matrix"):
        bound(value)


@pytest.mark.parametrize("squarings", [-1, 41])
def test_squarings_outside_their_range_are_refused(squarings: int) -> None:
    with refused(InputError, "squarings"):
        spectral_norm_gram(torch.eye(2, dtype=torch.float64), squarings=squarings)
