"""The search of the displacement certificate predicts the radius, and claims nothing."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement import search
from attnrobust.certify.displacement.bound import DisplacementBound
from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.certify.radius import largest_radius
from attnrobust.goals import Displacement
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from tests.cases import case_named

METHOD = DisplacementCertificate()


def problem_of(name: str, threat: MoveThreat, tolerance: float) -> Problem:
    case = case_named(name)
    return Problem(case.attention, case.tokens, threat, Displacement(tolerance, relative=True))


@pytest.mark.parametrize("tolerance", [0.01, 0.3])
@pytest.mark.parametrize(
    ("name", "threat", "proofs"),
    [
        ("biases", FrobeniusBall(), 3),
        ("causal-masses", FrobeniusBall(tokens=(0,)), 2),
        ("saturated-concatenated-masses", FrobeniusBall(), 3),
        ("causal-masses", PerTokenBall(), 8),
    ],
)
def test_the_predicted_radius_is_proved_and_is_that_of_a_long_search(
    name: str, threat: MoveThreat, proofs: int, tolerance: float
) -> None:
    problem = problem_of(name, threat, tolerance)
    certificate = METHOD.certify(problem)
    bound = DisplacementBound(problem, 1)
    radius, _ = largest_radius(lambda r: bound.usage(r).value, first_guess=bound.first_order_guess)
    adapts = isinstance(threat, PerTokenBall)  # by leaps, so that each search ends elsewhere
    assert certificate.radius >= (0.96 if adapts else 0.99) * radius
    assert certificate.evaluations <= proofs


def _blind(product: Callable[[Tensor], Tensor], start: Tensor, *, max_steps: int) -> tuple[float, Tensor]:
    """Nothing is large, and every direction is as good as the start."""
    return 1e-9, start / torch.linalg.vector_norm(start)


def _afraid(product: Callable[[Tensor], Tensor], start: Tensor, *, max_steps: int) -> tuple[float, Tensor]:
    return 1e9, torch.roll(start, 1) / torch.linalg.vector_norm(start)


@pytest.mark.parametrize("estimate", [_blind, _afraid])
def test_wrong_estimates_cost_proofs_and_claim_nothing(
    monkeypatch: pytest.MonkeyPatch, estimate: Callable[..., tuple[float, Tensor]]
) -> None:
    problem = problem_of("biases", FrobeniusBall(), 0.1)
    right = METHOD.certify(problem).radius
    monkeypatch.setattr(search, "rough_largest_eigenvalue", estimate)
    found = METHOD.certify(problem)
    assert 0.98 * right <= found.radius <= 1.01 * right
    bound = DisplacementBound(problem, 2)
    assert bound.usage(found.radius).value <= 1.0 + 5e-3


def test_a_radius_whose_coefficients_overflow_is_left() -> None:
    bound = DisplacementBound(problem_of("biases", FrobeniusBall(), 1e9), 0)
    guess = bound.first_guess
    assert guess is not None
    assert math.isfinite(guess)
