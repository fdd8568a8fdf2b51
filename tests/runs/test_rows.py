"""Rows: every way an input can end has its status, and what was computed before a failure stays."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnrobust.runs.evaluate
from attnrobust.attacks import AttackBudget
from attnrobust.goals import Margin
from attnrobust.results import AttackResult, CertificationReport, NotApplicable, Status
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.evaluate import RowTask, evaluate_row
from attnrobust.runs.rows import Row, row_from_dict
from attnrobust.threats.moves import FrobeniusBall
from tests.test_comparison import found, linear_problem, report

ISSUE_FIELDS = (
    *("input_id", "layer", "n", "threat", "goal", "tolerance", "margin"),
    *("certificate", "certificate_kind", "certified_radius", "attack", "attack_radius", "status", "gap"),
    *("seconds_certify", "seconds_attack", "seed", "certificates"),
)


def task(**changes: Any) -> RowTask:
    problem = linear_problem()
    made = RowTask("one", "layer", problem.network, problem.clean, problem.threat, problem.goal)
    return replace(made, **changes)


def configured(**values: Any) -> RunConfig:
    """A configuration; its model and inputs are not read."""
    return make_config({"model": "m", "tokens": "x.npz", "seed": 5} | values)


def evaluated(made: RowTask | None = None, **values: Any) -> Row:
    return evaluate_row(made or task(), configured(**values))


Fake = Callable[..., Any]


def pretend(monkeypatch: pytest.MonkeyPatch, *, certify: Fake | None = None, attack: Fake | None = None) -> None:
    if certify is not None:

        def certified(problem: Any, config: RunConfig, *_: Any) -> CertificationReport:
            made: CertificationReport = certify(problem, methods=config.named_certificates, seed=config.seed)
            return made

        monkeypatch.setattr(attnrobust.runs.evaluate, "certify_row", certified)
    if attack is not None:
        monkeypatch.setattr(attnrobust.runs.evaluate, "run_attack", attack)


def test_a_row_has_every_promised_field_and_the_right_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.1, 0.2), attack=lambda p, **_: found(p, 0.25))
    values = evaluated().as_dict()
    assert list(values)[: len(ISSUE_FIELDS)] == list(ISSUE_FIELDS)
    assert values["certified_radius"] == 0.2
    assert values["certificate"] == "bound-1"
    assert values["certificate_kind"] == "float64"
    assert values["attack_radius"] == 0.25
    assert values["gap"] == 1.25
    assert values["status"] == "found"
    assert values["tolerance"] == 0.5
    assert values["margin"] is None
    assert values["n"] == 1
    assert values["seed"] == 5
    assert values["certificates"]["bound-0"]["radius"] == 0.1


def test_seed_and_options_reach_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def certify(problem: Any, **options: Any) -> CertificationReport:
        seen["certify"] = options
        return report(problem, 0.1)

    def attack(problem: Any, **options: Any) -> AttackResult:
        seen["attack"] = options
        return found(problem, 0.25)

    pretend(monkeypatch, certify=certify, attack=attack)
    config = configured(attack={"epsilon": 0.3, "restarts": 3}, certificates=["displacement"])
    evaluate_row(task(), config)
    budget = AttackBudget(restarts=3)
    assert seen == {
        "certify": {"methods": ("displacement",), "seed": 5},
        "attack": {"method": "token-moving", "epsilon": 0.3, "seed": 5, "budget": budget},
    }


def test_certificates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = (NotApplicable("elsewhere", "needs a margin"),)
    pretend(monkeypatch, certify=lambda p, **_: replace(report(p, 0.1), skipped=skipped))
    row = evaluated(attack={"method": None})
    assert row.status == Status.CERTIFIED
    assert (row.attack, row.attack_radius, row.gap, row.seconds_attack) == (None,) * 4
    assert row.skipped == {"elsewhere": "needs a margin"}


def test_attack_alone() -> None:
    row = evaluated(certificates=[])
    assert row.status == Status.FOUND
    assert (row.certified_radius, row.certificate, row.seconds_certify, row.gap) == (None,) * 4
    assert row.attack_radius == pytest.approx(0.25, rel=1e-3)
    assert row.token_moves == pytest.approx((row.attack_radius,))


def test_every_tokens_own_radius() -> None:
    row = evaluated(certificates=[], attack={"token_radii": True})
    assert (row.status, row.message) == (Status.FOUND, None)
    assert row.token_radii == pytest.approx((row.attack_radius,), rel=1e-6)
    assert row_from_dict(row.as_dict()) == row
    assert row.token_certified == ()
    assert evaluated(certificates=[]).token_radii == ()


def test_every_tokens_certified_radius_and_an_attack_inside_it_is_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    def certified(problem: Any, **_: Any) -> tuple[Any]:
        return (replace(report(problem, 0.2).certificates[0], problem=problem.digest),)

    monkeypatch.setattr(attnrobust.runs.evaluate, "certified_token_radii", certified)
    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.1))
    single = task(threat=FrobeniusBall(tokens=(0,)))
    row = evaluated(single, attack={"token_radii": True})
    assert (row.status, row.token_certified) == (Status.FOUND, (0.2,))
    assert row_from_dict(row.as_dict()) == row
    assert evaluated(single).token_certified == ()

    def too_large(problem: Any, **_: Any) -> tuple[Any]:
        return (replace(report(problem, 0.3).certificates[0], problem=problem.digest),)

    monkeypatch.setattr(attnrobust.runs.evaluate, "certified_token_radii", too_large)
    assert evaluated(single, attack={"token_radii": True}).status == Status.UNSOUND


def test_no_violation_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(
        monkeypatch, certify=lambda p, **_: report(p, 0.1), attack=lambda p, **_: found(p, math.inf, Status.NOT_FOUND)
    )
    row = evaluated()
    assert row.status == Status.NOT_FOUND
    assert row.attack_radius is None
    assert row.gap is None


def test_unsound_row_keeps_both_radii(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.3), attack=lambda p, **_: found(p, 0.2))
    row = evaluated()
    assert row.status == Status.UNSOUND
    assert (row.certified_radius, row.attack_radius) == (0.3, 0.2)
    assert row.gap == pytest.approx(2 / 3)
    assert "UNSOUND" in (row.message or "")


def test_misclassified_input_has_both_radii_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)  # logits (0, 6): the prediction is 1
    row = evaluated(task(goal=Margin(weight, label=0)))
    assert row.status == Status.MISCLASSIFIED
    assert row.certified_radius == row.attack_radius == 0.0
    assert "not classified as 0" in (row.message or "")


def test_margin_is_reported_instead_of_a_tolerance() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    row = evaluated(task(goal=Margin(weight)), attack={"method": None})
    assert row.margin == 6.0
    assert row.tolerance is None


def test_an_attack_that_raises_leaves_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> AttackResult:
        raise ZeroDivisionError("in the driver")

    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.1), attack=explode)
    row = evaluated()
    assert row.status == Status.ERROR
    assert row.message == "ZeroDivisionError: in the driver"
    assert row.certified_radius == 0.1
    assert row.attack_radius is None


def test_pages_of_a_foreign_error_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> AttackResult:
        raise ValueError("a\n  b" * 1000)

    pretend(monkeypatch, attack=explode)
    message = evaluated().message or ""
    assert message.startswith("ValueError: a ba b")
    assert len(message) <= 400
    assert "\n" not in message


def test_an_attack_that_reports_an_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = lambda p, **_: replace(found(p, math.inf, Status.ERROR), note="singular matrix")  # noqa: E731
    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.1), attack=failed)
    row = evaluated()
    assert row.status == Status.ERROR
    assert row.message == "singular matrix"


def test_a_problem_that_cannot_be_posed_is_a_row_too() -> None:
    row = evaluated(task(threat=FrobeniusBall(tokens=(4,))))
    assert row.status == Status.ERROR
    assert row.message == "token 4 does not exist; the input has tokens 0 to 0"
    assert row.problem is None


def test_interruption_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> CertificationReport:
        raise KeyboardInterrupt

    pretend(monkeypatch, certify=interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluated()


def test_results_of_another_problem_do_not_make_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    other = linear_problem(0.125)
    pretend(monkeypatch, certify=lambda p, **_: report(p, 0.1), attack=lambda *_, **__: found(other, 0.25))
    row = evaluated()
    assert row.status == Status.ERROR
    assert "answers problem" in (row.message or "")


def test_plain_values_only() -> None:
    row = Row("a", "b", 1, "frobenius", "displacement 1", tokens=("x",), token_moves=(0.5,))
    assert row.as_dict()["tokens"] == ["x"]
    assert row.as_dict()["token_moves"] == [0.5]
