"""Both sides of a radius that is known exactly: no certificate is above it, no attack below it."""

import math

import pytest
from hypothesis import given, settings

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import CertificateMethod
from tests.assertions import assert_at_most
from tests.methods import MOVING_METHODS
from tests.strategies import Affine, Exact, Hopeless, affine_problems, hopeless_problems

ROUNDING = 1e-8  # of a clean output of size 10 from which a tolerance of 1e-3 or more is subtracted, and of its slopes
QUICK = AttackBudget(restarts=2, steps=10, rounds=1)


def between(exact: Exact, methods: tuple[CertificateMethod, ...]) -> None:
    problem = exact.problem
    answers = [method.certify(problem, seed=0) for method in methods if method.refuses(problem) is None]
    assert answers, "no certificate speaks about the problem"
    for certificate in answers:
        assert_at_most(certificate.radius, exact.radius, rtol=ROUNDING, what=f"{certificate.method}: {exact!r}")
    assert_at_most(exact.radius, attack(problem, budget=QUICK).radius, rtol=ROUNDING, what=repr(exact))


@settings(max_examples=6)
@given(affine_problems())
def test_affine_problems(drawn: Affine) -> None:
    between(drawn.build(), tuple(m for m in MOVING_METHODS if not m.name.startswith("margin")))  # these take seconds


@pytest.mark.slow
@settings(max_examples=300)
@given(affine_problems())
def test_many_affine_problems(drawn: Affine) -> None:
    between(drawn.build(), MOVING_METHODS)


@settings(max_examples=5)
@given(hopeless_problems())
def test_no_attack_succeeds_where_nothing_can(drawn: Hopeless) -> None:
    assert math.isinf(attack(drawn.build().problem, budget=QUICK).radius)
