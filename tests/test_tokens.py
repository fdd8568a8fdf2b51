import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import (
    PerturbedTokens,
    TokenMeasure,
    as_number,
    as_seed,
    as_tensor,
    require_finite,
    tensor_digest,
)
from tests.assertions import assert_same_bits, refused, shapes_unchecked

POINTS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def test_masses_are_equal_by_default() -> None:
    tokens = TokenMeasure(POINTS)
    assert (tokens.n, tokens.width) == (3, 2)
    assert tokens.uniform
    assert_same_bits(tokens.mass, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_numbers_are_held_in_float64_without_a_graph() -> None:
    tokens = TokenMeasure(POINTS.clone().requires_grad_(), torch.tensor([0.5, 0.25, 0.25]))
    assert tokens.points.dtype == tokens.mass.dtype == torch.float64
    assert not tokens.points.requires_grad
    assert not tokens.uniform


def test_half_precision_tokens_are_read_exactly() -> None:
    assert_same_bits(TokenMeasure(POINTS.bfloat16()).points, POINTS.double())


def test_masses_almost_equal_are_not_equal() -> None:
    mass = torch.full((4,), 0.25, dtype=torch.float64)
    mass[0], mass[1] = 0.25 + 1e-10, 0.25 - 1e-10
    points = torch.zeros(4, 2)
    assert not TokenMeasure(points, mass).uniform
    assert TokenMeasure(points, torch.full((4,), 0.25)).uniform
    assert TokenMeasure(points[:3], torch.full((3,), 1 / 3, dtype=torch.float64)).uniform


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1, 2, 3), ()])
def test_refuses_what_is_not_a_list_of_tokens(shape: tuple[int, ...]) -> None:
    with shapes_unchecked(), refused(InputError, "tokens must have shape"):
        TokenMeasure(torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_numbers_that_are_not_finite(bad: float) -> None:
    points = POINTS.clone()
    points[1, 0] = bad
    with refused(InputError, "tokens", "1 NaN or infinite entries of 6"):
        TokenMeasure(points)
    with refused(InputError, "mass", "NaN or infinite"):
        TokenMeasure(POINTS, torch.tensor([0.5, 0.5, bad]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_refuses_integers(dtype: torch.dtype) -> None:
    with shapes_unchecked(), refused(InputError, "tokens", "dtype"):
        TokenMeasure(POINTS.to(dtype))


@pytest.mark.parametrize(
    ("mass", "word"),
    [
        ([0.5, 0.5], r"shape \(3,\)"),
        ([[0.5, 0.25, 0.25]], r"shape \(3,\)"),
        ([0.5, 0.5, 0.0], "> 0"),
        ([0.7, 0.7, -0.4], "> 0"),
        ([0.5, 0.25, 0.2], "0.95"),
        ([1.0, 1.0, 1.0], "divide"),
    ],
)
def test_refuses_masses(mass: list[float], word: str) -> None:
    with shapes_unchecked(), refused(InputError, "mass", word):
        TokenMeasure(POINTS, torch.tensor(mass, dtype=torch.float64))


def test_masses_in_single_precision_are_divided_by_their_sum_in_double() -> None:
    """0.1 in float32 is off by 1.5e-9, so ten of them miss 1 by more than float64 data may."""
    single = torch.full((10,), 0.1)
    double = single.double()
    assert TokenMeasure(torch.zeros(10, 1), single).uniform
    with refused(InputError, "divide them by their sum"):
        TokenMeasure(torch.zeros(10, 1), double)
    assert TokenMeasure(torch.zeros(10, 1), double / double.sum()).uniform


def test_tokens_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TokenMeasure(POINTS).points = POINTS  # type: ignore[misc]


def test_later_changes_of_the_given_tensor_do_not_reach_the_measure() -> None:
    points, mass = POINTS.double(), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    tokens = TokenMeasure(points, mass)
    before = tokens.digest()
    points[0, 0] = 99.0
    mass[0] = 0.9
    assert tokens.digest() == before


def test_digest_sees_points_masses_and_shape() -> None:
    zeros = torch.zeros(4, 3)
    mass = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    moved = zeros.clone().double()
    moved[3, 2] = 5e-324
    measures = [
        TokenMeasure(zeros),
        TokenMeasure(moved),
        TokenMeasure(zeros, mass),
        TokenMeasure(zeros, mass.flip(0)),
        TokenMeasure(zeros.T),
    ]
    assert len({m.digest() for m in measures}) == len(measures)
    assert TokenMeasure(zeros.clone()).digest() == measures[0].digest()
    assert TokenMeasure(zeros.float()).digest() == measures[0].digest()


def test_tensor_digest_tells_absent_from_empty_and_orders_apart() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    lists: list[tuple[Tensor | None, ...]] = [(), (None,), (None, None), (a,), (a, None), (None, a), (a, b), (b, a)]
    lists += [(torch.zeros(0),), (torch.zeros(2, 1),), (torch.zeros(2).double(),), (torch.zeros(4),)]
    assert len({tensor_digest(*tensors) for tensors in lists}) == len(lists)
    assert tensor_digest(a, extra="x") != tensor_digest(a)
    assert tensor_digest(torch.arange(6.0).reshape(2, 3).T) == tensor_digest(
        torch.arange(6.0).reshape(2, 3).T.contiguous()
    )


def test_require_finite_counts() -> None:
    with refused(InputError, "weights", "2 NaN or infinite entries of 3"):
        require_finite("weights", torch.tensor([1.0, math.nan, math.inf]))


@pytest.mark.gpu
def test_masses_follow_the_points_to_their_device() -> None:
    tokens = TokenMeasure(POINTS.cuda(), torch.tensor([0.5, 0.25, 0.25]))
    assert tokens.mass.device.type == "cuda"
    assert tokens.digest() == TokenMeasure(POINTS, torch.tensor([0.5, 0.25, 0.25])).digest()


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ([[10**400]], "no array of numbers"),
        (np.ma.masked_less(np.ones((2, 2)), 2), "masked array"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, 2, device="meta"), "meta tensor"),
    ],
)
def test_arrays_that_hold_no_numbers_to_read(value: object, cause: str) -> None:
    with shapes_unchecked(), pytest.raises(InputError, match=cause):
        as_tensor("tokens", value)


@pytest.mark.parametrize("value", [10**400, np.ones((3, 3)), "1", None, complex(1, 1)])
def test_numbers_are_refused_in_one_line(value: object) -> None:
    with shapes_unchecked(), pytest.raises(InputError, match="give a number") as caught:
        as_number("radius", value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1.5, "0", 2**63, -(2**63) - 1, 10**400, True, np.datetime64("2020-01-01")])
def test_seeds_are_integers_of_64_bits(value: object) -> None:
    with shapes_unchecked(), pytest.raises(InputError, match="give an integer"):
        as_seed(value)


def test_parents_may_be_a_list() -> None:
    with shapes_unchecked():
        atoms = PerturbedTokens(torch.ones(2, 1), torch.tensor([0.5, 0.5]), [0, 1])  # type: ignore[arg-type]
    assert atoms.parent.tolist() == [0, 1]
    with shapes_unchecked(), pytest.raises(InputError, match="give an integer"):
        PerturbedTokens(torch.ones(2, 1), torch.tensor([0.5, 0.5]), [0, 0.5])  # type: ignore[arg-type]
