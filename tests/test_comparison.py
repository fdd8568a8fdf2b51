"""compare: refuses what does not belong together, and never lets a contradiction pass."""

import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.comparison import UnsoundError, compare, join
from attnrobust.errors import InputError, SoundnessError, UnknownNameError, UnsupportedThreatError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Certificate, CertificationReport, Kind, Status
from attnrobust.threats.copies import Copies
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure


def linear_problem(tolerance: float = 0.5, *, relative: bool = False) -> Problem:
    """One token, so the layer is linear: x -> x diag(2, 1), and the robust radius is exactly tolerance / 2."""
    eye = torch.eye(2, dtype=torch.float64)[None]
    layer = Attention(w_q=eye, w_k=eye, w_v=torch.diag(eye.new_tensor([2.0, 1.0]))[None])
    clean = TokenMeasure(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    return Problem(layer, clean, FrobeniusBall(), Displacement(tolerance, relative=relative))


def found(problem: Problem, radius: float, status: Status = Status.FOUND) -> AttackResult:
    return AttackResult(problem.digest, "by-hand", status, radius, 1.0, None, 1, 0.0, seed=7)


def report(problem: Problem, *radii: float) -> CertificationReport:
    made = tuple(
        Certificate(problem.digest, f"bound-{i}", Kind.FLOAT64, 0.0, r, "everywhere", f"derived {i}", 0.0, 1)
        for i, r in enumerate(radii)
    )
    return CertificationReport(problem.digest, made, (), 0.0)


def test_gap_is_attack_over_best_certificate() -> None:
    problem = linear_problem()
    comparison = join(problem, found(problem, 0.25), report(problem, 0.05, 0.125))
    assert comparison.gap == 2.0
    assert comparison.status is Status.FOUND


@pytest.mark.parametrize(
    ("radius", "status", "radii"),
    [(math.inf, Status.NOT_FOUND, (0.1,)), (0.25, Status.FOUND, ()), (0.25, Status.FOUND, (0.0,))],
)
def test_no_gap_where_one_side_is_missing(radius: float, status: Status, radii: tuple[float, ...]) -> None:
    problem = linear_problem()
    comparison = join(problem, found(problem, radius, status), report(problem, *radii))
    assert comparison.gap == math.inf
    assert comparison.status is status


def test_attack_inside_a_certified_radius_is_an_error_that_names_both() -> None:
    problem = linear_problem()
    with pytest.raises(UnsoundError) as caught:
        join(problem, found(problem, 0.2), report(problem, 0.1, 0.25, 0.3))
    message = str(caught.value)
    for part in ("by-hand", "seed 7", "bound-1", "derived 1", "bound-2", "derived 2"):
        assert part in message
    assert "bound-0" not in message  # it is not contradicted
    assert isinstance(caught.value, SoundnessError)
    assert caught.value.comparison.status is Status.UNSOUND
    assert caught.value.comparison.gap == pytest.approx(0.2 / 0.3)


def test_any_contradicted_certificate_counts_not_only_float64_ones() -> None:
    problem = linear_problem()
    probabilistic = replace(report(problem, 0.3).certificates[0], kind=Kind.PROBABILISTIC, failure_probability=1e-9)
    certification = CertificationReport(problem.digest, (probabilistic,), (), 0.0)
    with pytest.raises(UnsoundError, match="probabilistic"):
        join(problem, found(problem, 0.2), certification)


def test_what_was_not_verified_contradicts_nothing() -> None:
    problem = linear_problem()
    comparison = join(problem, found(problem, 0.2, Status.NOT_FOUND), report(problem, 0.3))
    assert comparison.status is Status.NOT_FOUND


def test_rounding_of_a_radius_is_forgiven_and_nothing_beyond_it() -> None:
    problem = linear_problem()
    assert join(problem, found(problem, 0.25), report(problem, 0.25 * (1 + 5e-13))).status is Status.FOUND
    with pytest.raises(UnsoundError):
        join(problem, found(problem, 0.25), report(problem, 0.25 * (1 + 3e-12)))


@pytest.mark.parametrize("where", ["attack", "report", "certificate"])
def test_results_of_different_problems_are_refused(where: str) -> None:
    problem, other = linear_problem(0.5), linear_problem(0.25)
    attack, certification = found(problem, 0.25), report(problem, 0.1)
    if where == "attack":
        attack = found(other, 0.25)
    elif where == "report":
        certification = report(other, 0.1)
    else:
        certification = replace(certification, certificates=report(other, 0.1).certificates)
    with pytest.raises(InputError, match="same weights, tokens, threat and goal"):
        join(problem, attack, certification)


@pytest.mark.parametrize("radius", [math.nan, -1.0])
def test_a_radius_that_is_no_distance_is_refused(radius: float) -> None:
    problem = linear_problem()
    with pytest.raises(InputError, match="must be >= 0"):
        join(problem, found(problem, radius), report(problem, 0.1))


def test_compare_brackets_the_exact_radius() -> None:
    """One token, linear layer: the robust radius is tolerance / 2 = 0.25."""
    comparison = compare(linear_problem(), seed=3)
    assert comparison.attack.radius == pytest.approx(0.25, rel=1e-3)
    assert comparison.attack.radius >= 0.25 * (1 - 1e-12)
    assert all(c.radius <= 0.25 * (1 + 1e-12) for c in comparison.certification.certificates)


def test_compare_refuses_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="token-moving"):
        compare(linear_problem(), attack="token-movin")
    with pytest.raises(UnknownNameError):
        compare(linear_problem(), methods=["no-such-bound"])


def test_the_error_survives_another_process() -> None:
    problem = linear_problem()
    with pytest.raises(UnsoundError) as caught:
        join(problem, found(problem, 0.2), report(problem, 0.3))
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - made one line above
    assert str(again) == str(caught.value)
    assert again.comparison.gap == caught.value.comparison.gap


def test_measures_have_questions_of_their_own() -> None:
    """A certificate for moved tokens never answers for copies, nor the other way round."""
    problem = linear_problem()
    copied = replace(problem, threat=Copies(1))
    comparison = compare(copied, budget=AttackBudget(restarts=1, steps=4, rounds=1))
    assert comparison.problem == copied.digest != problem.digest
    # one token and a linear layer: copies change nothing, and moving both is moving the token
    assert comparison.certification.best.radius == pytest.approx(0.25, rel=2e-3)
    assert comparison.attack.radius >= 0.25 * (1 - 1e-9)
    with pytest.raises(InputError, match="same weights, tokens, threat and goal"):
        join(copied, comparison.attack, report(problem, 0.1))
    with pytest.raises(InputError, match="same weights, tokens, threat and goal"):
        join(problem, comparison.attack, comparison.certification)
    with pytest.raises(UnsupportedThreatError, match="name 'token-duplication'"):
        compare(copied, attack="token-moving")
    inside = replace(comparison.attack, radius=0.1, status=Status.FOUND)
    with pytest.raises(UnsoundError, match="measure-copies"):
        join(copied, inside, comparison.certification)


@pytest.mark.parametrize("ask", [compare, certify, attack])
def test_a_threat_beside_the_problem_is_refused_with_the_new_way(ask: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"Problem\(network, clean, threat, goal\)"):
        ask(linear_problem(), threat=Copies(1))
    with pytest.raises(TypeError, match="'tread'"):
        ask(linear_problem(), tread=1)
