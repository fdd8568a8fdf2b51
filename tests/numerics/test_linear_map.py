"""Linear maps: composition against matrices, singular values against full decompositions."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.linear_map import (
    LinearMap,
    add,
    largest_singular_value_lower,
    largest_singular_value_upper,
    pool_rows,
    scale_rows,
    scale_tokens,
    select_tokens,
    transpose,
)


def _map(matrix: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> LinearMap:
    return LinearMap(
        matvec=lambda v: (v.flatten(-len(in_shape)) @ matrix.T).unflatten(-1, out_shape),
        rmatvec=lambda u: (u.flatten(-len(out_shape)) @ matrix).unflatten(-1, in_shape),
        in_shape=in_shape,
        out_shape=out_shape,
    )


def _random(out: int, into: int) -> Tensor:
    return torch.randn(out, into, dtype=torch.float64)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _assert_is(linear: LinearMap, matrix: Tensor) -> None:
    torch.testing.assert_close(linear.dense(), matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transpose(linear).dense(), matrix.T, rtol=1e-12, atol=1e-12)
    stacked = torch.randn(2, 3, *linear.in_shape, dtype=torch.float64)
    expected = (stacked.flatten(2) @ matrix.T).unflatten(-1, linear.out_shape)
    torch.testing.assert_close(linear.matvec(stacked), expected)


@pytest.mark.parametrize(("n", "d", "e"), [(1, 1, 1), (4, 3, 2), (2, 5, 7), (40, 2, 1)])
def test_composition_against_matrices(n: int, d: int, e: int) -> None:
    matrix = _random(n * e, n * d)
    linear = _map(matrix, (n, d), (n, e))
    _assert_is(linear, matrix)
    weights, scale = torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    _assert_is(pool_rows(linear, weights), torch.einsum("n,nem->em", weights, matrix.reshape(n, e, n * d)))
    _assert_is(scale_tokens(linear, scale), matrix * scale.repeat_interleave(d))
    _assert_is(scale_rows(linear, scale), matrix * scale.repeat_interleave(e)[:, None])
    movable = torch.arange(n) % 2 == 0
    _assert_is(select_tokens(linear, movable), matrix[:, movable.repeat_interleave(d)])
    both = select_tokens(pool_rows(scale_tokens(linear, scale), weights), movable)
    columns = (matrix * scale.repeat_interleave(d))[:, movable.repeat_interleave(d)]
    _assert_is(both, torch.einsum("n,nem->em", weights, columns.reshape(n, e, -1)))
    _assert_is(add(linear, linear), 2 * matrix)


def test_wrong_shapes_are_refused() -> None:
    linear = _map(_random(6, 6), (3, 2), (3, 2))
    with pytest.raises(InputError, match="token scale"):
        scale_tokens(linear, torch.ones(2, dtype=torch.float64))
    with pytest.raises(InputError, match="row weights"):
        pool_rows(linear, torch.ones(4, dtype=torch.float64))
    with pytest.raises(InputError, match="at least one token"):
        select_tokens(linear, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match="different shapes"):
        add(linear, pool_rows(linear, torch.ones(3, dtype=torch.float64)))
    with pytest.raises(InputError, match="too large to build"):
        _map(torch.zeros(1, 1), (3000, 1), (3000, 1)).dense()


@pytest.mark.parametrize(("out", "into"), [(1, 1), (1, 9), (9, 1), (3, 3), (30, 20), (20, 30), (300, 90), (90, 300)])
def test_singular_value_from_both_sides(out: int, into: int) -> None:
    matrix = _random(out, into)
    linear, truth = _map(matrix, (into, 1), (out, 1)), _norm(matrix)
    lower, vector = largest_singular_value_lower(linear)
    assert truth * (1 - 1e-9) <= lower.value <= truth
    assert vector.shape == (into, 1)
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1.0, abs=1e-12)
    assert float(torch.linalg.vector_norm(linear.matvec(vector))) == pytest.approx(truth, rel=1e-9)
    decomposed = largest_singular_value_upper(linear)
    assert decomposed.failure_probability == 0.0
    assert truth <= decomposed.value <= truth * (1 + 1e-9)
    iterated = largest_singular_value_upper(linear, dense_limit=0, failure_probability=1e-8)
    assert iterated.failure_probability == 1e-8
    assert truth <= iterated.value <= truth * (1 + 1.1e-3)


def test_gram_matrix_replaces_a_matrix_that_is_too_large() -> None:
    """One side small, the other so large that the matrix itself may not be built: still deterministic."""
    column = _random(50, 3)
    wide = LinearMap(
        matvec=lambda v: torch.einsum("km,...m->...k", column, v).repeat_interleave(40_000, -1),
        rmatvec=lambda u: torch.einsum("km,...k->...m", column, u.unflatten(-1, (50, 40_000)).sum(-1)),
        in_shape=(3,),
        out_shape=(2_000_000,),
    )
    truth = _norm(column) * 200.0
    upper = largest_singular_value_upper(wide)
    assert upper.failure_probability == 0.0
    assert truth <= upper.value <= truth * (1 + 1e-9)


@pytest.mark.parametrize("size", [1, 5, 50])
def test_zero_maps(size: int) -> None:
    linear = _map(torch.zeros(size, size, dtype=torch.float64), (size,), (size,))
    lower, vector = largest_singular_value_lower(linear)
    assert lower.value == 0.0
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1.0)
    assert largest_singular_value_upper(linear).value == 0.0
    assert largest_singular_value_upper(linear, dense_limit=0).value == 0.0


def test_repeated_top_values() -> None:
    """An isometry has only one singular value; ARPACK's subspace closes at once."""
    isometry = torch.linalg.qr(_random(60, 40)).Q
    linear = _map(isometry, (40,), (60,))
    assert largest_singular_value_lower(linear)[0].value == pytest.approx(1.0, abs=1e-9)
    assert 1.0 <= largest_singular_value_upper(linear, dense_limit=0).value <= 1.001


def test_nan_is_an_error_on_both_sides() -> None:
    for size in (3, 100):
        linear = _map(torch.full((size, size), math.nan, dtype=torch.float64), (size,), (size,))
        with pytest.raises(InputError, match="NaN or infinite"):
            largest_singular_value_lower(linear)
        with pytest.raises(InputError, match="NaN or infinite"):
            largest_singular_value_upper(linear)
        with pytest.raises(InputError, match="NaN or infinite"):
            largest_singular_value_upper(linear, dense_limit=0)


def test_results_depend_on_the_seed_only() -> None:
    linear = _map(_random(200, 150), (150,), (200,))
    first = largest_singular_value_upper(linear, dense_limit=0, seed=3)
    assert first == largest_singular_value_upper(linear, dense_limit=0, seed=3)
    assert first != largest_singular_value_upper(linear, dense_limit=0, seed=4)
