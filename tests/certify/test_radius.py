import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnrobust.certify.radius import LARGEST, MAX_EVALUATIONS, SMALLEST, largest_radius
from attnrobust.errors import InputError
from tests.assertions import refused

TRUE = st.floats(min_value=1e-9, max_value=1e9)
GUESS = st.none() | st.floats(min_value=1e-14, max_value=1e14) | st.sampled_from([0.0, -1.0, math.inf, math.nan])


class Recorded:
    """A bound that remembers which radii it was asked for and what it said."""

    def __init__(self, usage: Callable[[float], float]) -> None:
        self.usage, self.said = usage, dict[float, float]()

    def __call__(self, radius: float) -> float:
        self.said[radius] = self.usage(radius)
        return self.said[radius]


SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda r, true: r / true,
    "square": lambda r, true: (r / true) ** 2,
    "root": lambda r, true: math.sqrt(r / true),
    "linear plus square": lambda r, true: 0.5 * r / true + 0.5 * (r / true) ** 2,
    "exponential": lambda r, true: math.expm1(min(r / true, 700.0)) / math.expm1(1.0),
    "step": lambda r, true: 0.0 if r <= true else math.inf,
    "blind beyond twice": lambda r, true: r / true if r <= 2 * true else math.inf,
}


@pytest.mark.parametrize("shape", SHAPES)
@given(true=TRUE, guess=GUESS, tolerance=st.sampled_from([1e-2, 1e-3, 1e-6]))
def test_finds_the_largest_radius_from_below(shape: str, true: float, guess: float | None, tolerance: float) -> None:
    bound = Recorded(lambda r: SHAPES[shape](r, true))
    radius, evaluations = largest_radius(bound, first_guess=guess, relative_tolerance=tolerance)
    assert bound.said[radius] <= 1.0, "the returned radius was itself evaluated, and passed"
    assert true / (1 + tolerance) <= radius * (1 + 1e-12)
    assert evaluations <= MAX_EVALUATIONS


@given(true=TRUE)
def test_a_linear_bound_takes_few_evaluations(true: float) -> None:
    """Each evaluation of a real bound costs a spectral norm, so a search from a bad guess must still be short."""
    bound = Recorded(lambda r: r / true)
    _, evaluations = largest_radius(bound)
    assert evaluations == len(bound.said)
    assert evaluations <= 10
    _, with_a_guess = largest_radius(lambda r: r / true, first_guess=true * 1.1)
    assert with_a_guess <= 3


@given(st.lists(st.floats(min_value=0.0, max_value=3.0) | st.just(math.inf), min_size=1, max_size=50), GUESS)
def test_only_a_radius_that_passed_is_returned(answers: list[float], guess: float | None) -> None:
    """Whatever the bound says, monotone or not: the claim at r rests on the evaluation at r alone."""
    left = iter(answers)
    bound = Recorded(lambda _: next(left, 2.0))
    radius, _ = largest_radius(bound, first_guess=guess)
    assert radius == 0.0 or bound.said[radius] <= 1.0


@pytest.mark.parametrize("shape", SHAPES)
@given(true=TRUE, guess=GUESS, over=st.floats(min_value=1.0, max_value=100.0))
def test_a_ceiling_costs_one_percent_and_no_evaluation(
    shape: str, true: float, guess: float | None, over: float
) -> None:
    bound = Recorded(lambda r: SHAPES[shape](r, true))
    radius, _ = largest_radius(bound, first_guess=guess, ceiling=over * true)
    assert bound.said[radius] <= 1.0
    assert true / (1.01 + 1e-12) <= radius
    assert max(bound.said) <= over * true * (1 + 1e-3) * (1 + 1e-12), "what a right bound must fail is not tried"


@pytest.mark.parametrize("shape", SHAPES)
@given(true=TRUE, guess=GUESS, over=st.floats(min_value=1.01, max_value=100.0))
def test_a_bound_that_passes_beyond_the_ceiling_shows(
    shape: str, true: float, guess: float | None, over: float
) -> None:
    radius, _ = largest_radius(lambda r: SHAPES[shape](r, true), first_guess=guess, ceiling=true / over)
    assert true / (1 + 1e-3) <= radius * (1 + 1e-12)


def test_nothing_is_certified_under_a_ceiling_of_zero() -> None:
    assert largest_radius(lambda r: 1.0 + r, ceiling=0.0)[0] == 0.0
    with pytest.raises(InputError, match="the ceiling must be >= 0; got nan"):
        largest_radius(lambda r: r, ceiling=math.nan)


def test_nothing_certified_is_zero() -> None:
    assert largest_radius(lambda _: math.inf)[0] == 0.0
    assert largest_radius(lambda _: 1.0 + 1e-15)[0] == 0.0
    assert largest_radius(lambda r: r / (SMALLEST / 10))[0] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99, 0.998])
def test_a_bound_that_never_fails_ends_at_the_largest_radius(share: float) -> None:
    """A saturated softmax can bound the change of an output for ever; the search must not creep."""
    for usage in (lambda _: share, lambda r: share * -math.expm1(-r)):
        radius, evaluations = largest_radius(usage)
        assert radius == LARGEST
        assert evaluations <= 25


@pytest.mark.parametrize("true", [1e-6, 0.3, 2.5, 1e6])
@pytest.mark.parametrize("beyond", [1.5, 100.0, math.inf])
def test_a_sudden_failure_is_found(true: float, beyond: float) -> None:
    radius, evaluations = largest_radius(lambda r: 0.5 if r <= true else beyond)
    assert true / 1.001 <= radius <= true
    assert evaluations <= 80


def test_nan_is_an_error() -> None:
    with refused(InputError, "NaN", "radius 1"):
        largest_radius(lambda _: math.nan)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, math.nan])
def test_refuses_tolerances(tolerance: float) -> None:
    with refused(InputError, "relative_tolerance"):
        largest_radius(lambda r: r, relative_tolerance=tolerance)
