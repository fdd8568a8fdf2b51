"""Only what can win: the largest radius is that of all certificates, and what is left out says why."""

import math
from dataclasses import dataclass, replace
from itertools import chain

import pytest

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import METHODS, certify
from attnrobust.certify.contest import (
    BEHIND,
    BEHIND_BUT_PER_TOKEN,
    LEADERS,
    NEVER_ABOVE,
    ON_REQUEST,
    certify_what_can_win,
)
from attnrobust.problem import Problem
from attnrobust.results import Certificate, Kind, NotApplicable, Status
from attnrobust.threats.moves import PerTokenBall
from tests.cases import Case, problems, telling_cases, telling_first


@dataclass(frozen=True)
class Recorded:
    """A method whose answer is known."""

    name: str
    answer: Certificate | NotApplicable

    def undeclared(self, problem: Problem) -> str | None:
        return self.answer.reason if isinstance(self.answer, NotApplicable) else None

    def attempt(self, problem: Problem, *, seed: int, named: bool, ceiling: float) -> Certificate | NotApplicable:
        return self.answer


def certificate(name: str, radius: float) -> Recorded:
    return Recorded(name, Certificate("p", name, Kind.FLOAT64, 0.0, radius, "here", "nowhere", 0.0, 1))


def left_out(problem: Problem, attack_radius: float, **radii: float) -> dict[str, str]:
    methods = [certificate(name.replace("_", "-"), radius) for name, radius in radii.items()]
    report = certify_what_can_win(problem, methods, attack_radius=attack_radius)
    return {entry.method: entry.reason for entry in report.skipped}


ONE = next(problems(telling_cases()[0]))
USUAL = ("plain-h1-n5-d4", "concatenated-biases-one-head", "causal-masses", "finite-mask-masses")


def test_behind_a_near_leader_the_others_are_left_out_and_named() -> None:
    reasons = left_out(ONE, 1.0, havens2024_local=0.1, displacement=0.5, other=0.4)
    assert list(reasons) == ["havens2024-local"]
    assert reasons["havens2024-local"] == "not run: skipped by default behind displacement; --all-certificates runs it"


def test_curvature_is_left_out_unless_every_token_has_a_ball_of_its_own() -> None:
    per_token = replace(ONE, threat=PerTokenBall())
    assert list(left_out(ONE, 1.0, displacement=0.5, singla2020_curvature=0.4)) == ["singla2020-curvature"]
    assert left_out(per_token, 1.0, displacement=0.5, singla2020_curvature=0.4) == {}


def test_far_from_the_attack_and_without_a_leader_everything_runs() -> None:
    assert left_out(ONE, 2.0, havens2024_local=0.1, displacement=0.5) == {}
    assert left_out(ONE, 2.0, rigorous_local=0.1, spread_lipschitz=1.5) == {}
    assert left_out(ONE, 2.0, rigorous_local=0.1, displacement=0.0) == {}


def test_ball_arithmetic_runs_only_where_no_leader_certifies() -> None:
    for attack_radius in (2.0, math.inf):
        reasons = left_out(ONE, attack_radius, rigorous_local=0.1, havens2024_local=0.1, displacement=0.5)
        assert list(reasons) == ["rigorous-local"]
        assert "skipped by default behind displacement" in reasons["rigorous-local"]


def test_what_is_never_above_another_by_theorem_is_dominated() -> None:
    """Whatever the order of the registry and the gap; with no radius of the other it runs."""
    radii = {"castin2024_reported": 0.1, "castin2024_derived": 0.2, "spread_lipschitz": 0.3}
    reasons = left_out(ONE, 9.0, **radii)
    assert {*reasons} == {"castin2024-reported", "castin2024-derived"}
    assert all("dominated by spread-lipschitz;" in reason for reason in reasons.values())
    assert left_out(ONE, 9.0, castin2024_derived=0.2) == {}


@pytest.mark.parametrize("case", [c for c in telling_first(telling_cases()) if c.id in USUAL])
def test_the_declared_order_holds(case: Case) -> None:
    for problem in problems(case):
        radii = {c.method: c.radius for c in certify(problem, methods=[*NEVER_ABOVE, "spread-lipschitz"]).certificates}
        for below, above in NEVER_ABOVE.items():
            for other in above:
                if {below, other} <= {*radii}:
                    assert radii[below] <= radii[other] * (1 + 2e-3)  # the search's accuracy, twice


def test_within_one_percent_of_the_attack_nothing_more_runs() -> None:
    reasons = left_out(ONE, 1.0, singla2020_curvature=0.9, displacement=0.995)
    assert "within 1%" in reasons["singla2020-curvature"]


@pytest.mark.parametrize("case", [c for c in telling_first(telling_cases()) if c.id in USUAL])
def test_the_largest_radius_is_that_of_all(case: Case) -> None:
    agrees(next(problems(case)))


@pytest.mark.slow
@pytest.mark.parametrize("case", telling_first(telling_cases()))
def test_the_largest_radius_is_that_of_all_on_every_telling_problem(case: Case) -> None:
    for problem in problems(case):
        agrees(problem)


def agrees(problem: Problem) -> None:
    """The best certificate of the contest is the best of all, or one that the attack leaves no room to beat."""
    found = attack(problem, budget=AttackBudget(restarts=2, steps=20, rounds=2))
    everything = certify(problem)
    if found.status is not Status.FOUND or everything.best is None:
        return
    answers: list[Certificate | NotApplicable] = [*everything.certificates, *everything.skipped]
    methods = [Recorded(answer.method, answer) for answer in answers]
    chosen = certify_what_can_win(problem, methods, attack_radius=found.radius)
    assert chosen.best is not None
    near = chosen.best.radius * 1.01 >= found.radius
    assert near or chosen.best.radius == everything.best.radius


def test_the_names_exist() -> None:
    assert {*LEADERS, *BEHIND, *BEHIND_BUT_PER_TOKEN, *ON_REQUEST, *NEVER_ABOVE, *chain(*NEVER_ABOVE.values())} <= {
        method.name for method in METHODS
    }
