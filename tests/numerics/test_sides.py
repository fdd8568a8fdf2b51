import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrobust.errors import InputError
from attnrobust.numerics.sides import Lower, Upper, round_down, round_up
from tests.assertions import refused

# 1e-290: below, the relative amount is lost among the subnormal numbers and only the last place is moved
SIZES = st.floats(min_value=1e-290, max_value=1e300)


@given(SIZES)
def test_round_up_moves_outward_by_the_amount(value: float) -> None:
    assert Fraction(round_up(value)) >= Fraction(value) * (1 + Fraction(1, 10**12))
    assert round_up(value) <= value * (1 + 2e-12)


@given(SIZES)
def test_round_down_moves_inward_by_the_amount(value: float) -> None:
    assert Fraction(round_down(value)) <= Fraction(value) * (1 - Fraction(1, 10**12))
    assert round_down(value) >= value * (1 - 2e-12)


@given(st.floats(min_value=0.0, max_value=1e300))
def test_rounding_always_moves(value: float) -> None:
    assert round_up(value) > value
    assert round_down(value) < value or value == 0.0
    assert round_down(value) >= 0.0


def test_rounding_at_the_ends() -> None:
    assert round_up(0.0) > 0.0
    assert round_down(0.0) == 0.0
    assert round_up(math.inf) == math.inf
    assert round_down(5e-324) == 0.0


@given(SIZES, st.floats(1e-15, 0.5))
def test_rounding_by_a_chosen_amount(value: float, relative: float) -> None:
    assert Fraction(round_up(value, relative=relative)) >= Fraction(value) * (
        1 + Fraction(relative) * Fraction(999, 1000)
    )
    assert Fraction(round_down(value, relative=relative)) <= Fraction(value) * (
        1 - Fraction(relative) * Fraction(999, 1000)
    )


@pytest.mark.parametrize("side", [Lower, Upper])
def test_nan_is_no_bound(side: type[Lower] | type[Upper]) -> None:
    with refused(InputError, "NaN"):
        side(math.nan)


def test_infinity_says_nothing_and_is_allowed() -> None:
    assert Upper(math.inf).value == math.inf
    assert Lower(-math.inf).value == -math.inf


@pytest.mark.parametrize("probability", [-1e-9, 1.0, 1.5, math.nan, math.inf])
def test_failure_probability_is_a_probability(probability: float) -> None:
    with refused(InputError, "failure probability"):
        Upper(1.0, probability)


def test_sides_do_not_mix() -> None:
    assert Lower(1.0) != Upper(1.0)  # type: ignore[comparison-overlap]
    with pytest.raises(TypeError):
        _ = Lower(1.0) < Upper(2.0)


def test_bounds_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Upper(1.0).value = 0.0  # type: ignore[misc]


def test_the_type_checker_refuses_a_swap() -> None:
    """Checked by mypy: it reports an ignore that hides nothing, so each one here is a swap that it does refuse."""

    def certified_from(bound: Upper) -> float:
        return bound.value

    def attacked_from(bound: Lower) -> float:
        return bound.value

    assert certified_from(Upper(1.0)) == 1.0
    assert certified_from(Lower(1.0)) == 1.0  # type: ignore[arg-type]
    assert attacked_from(Upper(1.0)) == 1.0  # type: ignore[arg-type]
