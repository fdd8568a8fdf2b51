"""The product: no verified attack inside a certified radius, over every case, threat, goal, attack and certificate."""

from functools import cache

import pytest

from attnrobust.attacks import AttackBudget, attack_many
from attnrobust.certify import CertificateMethod
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from tests.cases import Case, cases, problems, telling_first
from tests.methods import MOVING_ATTACKS, MOVING_METHODS

QUICK = AttackBudget(restarts=4, steps=30, rounds=1)
FULL = AttackBudget()


@cache
def _attacked(case: Case, budget: AttackBudget) -> tuple[tuple[Problem, AttackResult], ...]:
    """Every problem of a case with the nearest violation that each attack finds."""
    chosen = tuple(problems(case))
    rows: list[tuple[Problem, AttackResult]] = []
    for attack in MOVING_ATTACKS:
        rows += zip(chosen, attack_many(chosen, method=attack.name, seed=1, budget=budget), strict=True)
    return tuple(rows)


@pytest.mark.parametrize("case", telling_first(cases()))
def test_no_attack_inside_a_certified_radius(case: Case) -> None:
    """Every certificate in one test, so that a case is attacked once whichever process runs it."""
    for method in MOVING_METHODS:
        _compare(method, case, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("method", MOVING_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_no_strong_attack_inside_a_certified_radius(method: CertificateMethod, case: Case) -> None:
    _compare(method, case, FULL)


def _compare(method: CertificateMethod, case: Case, budget: AttackBudget) -> None:
    compared = 0
    certified: dict[str, float] = {}
    for problem, attacked in _attacked(case, budget):
        if method.refuses(problem) is not None:
            continue
        if problem.digest not in certified:
            certificate = method.certify(problem, seed=0)
            assert certificate.problem == attacked.problem == problem.digest
            certified[problem.digest] = certificate.radius
        radius = certified[problem.digest]
        assert radius >= 0.0
        label = f"{attacked.attack} against {method.name} on {problem.threat.key}, {problem.goal.key}"
        if attacked.status is Status.FOUND:
            compared += 1
            assert attacked.perturbed is not None
            assert float(problem.usage(attacked.perturbed - problem.clean.points)) >= 1.0, label
            assert radius <= attacked.radius, f"{label}: certified {radius!r}, violated at {attacked.radius!r}"
    if not compared and not case.constant and certified:
        pytest.fail("no attack found anything on this case, so the test says nothing")
