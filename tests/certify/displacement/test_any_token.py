"""Displacement under "any one token": the worst known token, and what its bounds share."""

from dataclasses import replace

import pytest
import torch

from attnrobust.certify.displacement import any_token as displacement_token
from attnrobust.certify.displacement.any_token import AnyTokenBound
from attnrobust.certify.displacement.method import DisplacementBound, DisplacementCertificate
from attnrobust.goals import Displacement
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat
from tests.cases import case_named
from tests.displacement_tools import clean_rows

METHOD = DisplacementCertificate()


def _problem(name: str, threat: MoveThreat) -> Problem:
    case = case_named(name)
    return Problem(case.attention, case.tokens, threat, Displacement(0.1))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("biases", 1),
        ("padding", 2**18),
        pytest.param("causal-biases-strong", 1, marks=pytest.mark.slow),
        pytest.param("masses-one-dominates", 2**18, marks=pytest.mark.slow),
    ],
)
def test_any_token_is_the_worst_known_token(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tokens' bounds are thrown away and built again."""
    monkeypatch.setattr(displacement_token, "KEPT_NUMBERS", kept)
    tokens = range(case_named(name).n)
    single = [METHOD.certify(_problem(name, FrobeniusBall(tokens=(token,)))).radius for token in tokens]
    radius = METHOD.certify(_problem(name, AnyToken())).radius
    assert min(single) * (1 - 3e-3) <= radius <= min(single) * (1 + 3e-3)
    assert radius >= METHOD.certify(_problem(name, FrobeniusBall())).radius * (1 - 3e-3)
    some = METHOD.certify(_problem(name, AnyToken(tokens=(0, 1)))).radius
    assert abs(some / min(single[:2]) - 1.0) <= 3e-3


def test_usage_is_the_largest_of_the_tokens() -> None:
    problem = _problem("biases", AnyToken())
    for radius in (1e-3, 0.5):
        bounds = [
            DisplacementBound(_problem("biases", FrobeniusBall(tokens=(token,))), 0) for token in range(problem.clean.n)
        ]
        exact = max(bound.usage(radius).value for bound in bounds)
        assert AnyTokenBound(problem, 0, 1e-3).usage(radius).value == pytest.approx(exact, rel=3e-3)


def test_a_known_pass_covers_smaller_radii_only() -> None:
    bound = AnyTokenBound(_problem("biases", AnyToken()), 0, 1e-3)
    radius = bound.first_guess
    assert radius is not None
    assert bound.usage(radius).value <= 1.0
    assert bound.usage(0.5 * radius).value <= 1.0
    assert bound.usage(1.1 * radius).value > 1.0


def test_rebuilt_bounds_use_new_start_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displacement_token, "KEPT_NUMBERS", 1)
    bound = AnyTokenBound(_problem("biases", AnyToken()), 0, 1e-3)
    seeds = [bound.bound_of(index)._chance.next_event()[1] for index in (0, 1, 0, 1)]
    assert len(set(seeds)) == 4


def test_questions_at_one_input_share_what_does_not_depend_on_the_moving_tokens() -> None:
    first, alone = clean_rows("biases", tokens=(0,)), clean_rows("biases", tokens=(1,))
    moving = ("logit_reach", "average_reach", "gram", "contrast", "value_reach", "first_order_reach")
    fixed = ("bilinear_norms", "cross", "weight", "values")
    for name in moving:
        getattr(first, name)
    second = replace(first, movable=alone.movable)
    assert second.clean.weight is first.clean.weight
    for name in moving:
        assert torch.allclose(getattr(second, name), getattr(alone, name), rtol=1e-12, atol=0.0), name
    for name in fixed:
        assert torch.allclose(getattr(second.clean, name), getattr(alone.clean, name), rtol=1e-12, atol=0.0), name


def test_clean_rows_of_another_input_are_refused() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(tokens=(0,)), Displacement(0.1))
    with pytest.raises(ValueError, match="another layer"):
        DisplacementBound(problem, 0, clean=clean_rows("causal-masses").clean)
