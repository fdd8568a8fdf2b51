"""foolbox attacks as drivers: what they propose is verified here, and their failures are the status of one row."""

import inspect
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import FOOLBOX_ATTACKS, AttackBudget, attack, attack_many, attack_named, foolbox_names
from attnrobust.attacks.foolbox import library as foolbox_library
from attnrobust.attacks.foolbox.driver import ball_factor, method_of
from attnrobust.attacks.foolbox.library import FixedEpsilonAttack, MinimizationAttack, attacks, l2
from attnrobust.attacks.foolbox.names import foolbox_entry
from attnrobust.attacks.method import run_many
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_same_bits
from tests.attacks.test_token_moving import check_verified, draw
from tests.cases import case_named, threats

QUICK = AttackBudget(restarts=2, steps=8, rounds=2)


def problem_of(name: str, threat: MoveThreat, goal: Goal | None = None) -> Problem:
    case = case_named(name)
    chosen = goal or Margin(draw(3, case.attention.out_width), pool="mean")
    return Problem(case.attention, case.tokens, threat, chosen)


# ---- names -------------------------------------------------------------------------------------------------------


def test_every_foolbox_attack_is_supported_or_refused_with_a_reason() -> None:
    offered = {kind.__name__ for kind in vars(attacks).values() if inspect.isclass(kind)} - {"Attack"}
    listed = [entry.attack for entry in FOOLBOX_ATTACKS]
    assert sorted(listed) == sorted(offered)
    for entry in FOOLBOX_ATTACKS:
        assert entry.supported == (entry.reason == "") == (entry.cure == ""), entry.name
        kind = getattr(attacks, entry.attack)
        if entry.supported:
            assert entry.fixed == issubclass(kind, FixedEpsilonAttack), entry.name
            assert attack_named("foolbox:" + entry.name).name == "foolbox:" + entry.name
            continue
        with pytest.raises(InputError, match="refused") as caught:
            attack_named("foolbox:" + entry.name)
        assert entry.reason in str(caught.value)
        assert entry.cure in str(caught.value)
        named = [word.strip(",;") for word in entry.cure.split() if word.startswith("foolbox:")]
        assert all(foolbox_entry(name).supported for name in named), entry.cure


def test_foolbox_abbreviations_and_class_names_are_understood() -> None:
    for short in ("FGM", "FGSM", "PGD", "L2PGD", "L1AdamPGD", "AdamPGD", "MIFGSM"):
        assert foolbox_entry("foolbox:" + short).attack == getattr(attacks, short).__name__
    assert attack_named("foolbox:L2ProjectedGradientDescentAttack").name == "foolbox:L2PGD"
    with pytest.raises(UnknownNameError, match="foolbox:L2PGD"):
        attack_named("foolbox:L2PDG")
    with pytest.raises(UnknownNameError, match="token-moving"):
        attack_named("token-movin")


def test_foolbox_is_imported_when_it_is_used_and_not_before() -> None:
    code = (
        "import sys, attnrobust.attacks as a, attnrobust.cli; a.attack_named('foolbox:DDN'); "
        "assert not {'foolbox', 'eagerpy'} & set(sys.modules), 'too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- what is proposed is verified --------------------------------------------------------------------------------


SHORT = AttackBudget(restarts=2, steps=6, rounds=1)
EVERY_NORM = (FrobeniusBall(), PerTokenBall(norm="linf"), AnyToken())


def check_attack(name: str, threat: MoveThreat, goal: Goal | None) -> None:
    problem = problem_of("plain-h2-n3-d4", threat, goal)
    best = attack(problem, budget=SHORT).radius
    smallest = attack(problem, method=name, budget=SHORT)
    check_verified(problem, smallest)
    assert smallest.attack == name
    assert smallest.queries > 0
    if "Noise" not in name:
        assert smallest.status is Status.FOUND, smallest
        assert_at_most(smallest.radius, 60 * best, what="not absurd")
    check_verified(problem, attack(problem, method=name, budget=SHORT, epsilon=1.5 * best))


@pytest.mark.parametrize("name", foolbox_names())
@pytest.mark.one_in(2)
def test_every_supported_attack_gives_verified_rows(name: str) -> None:
    index = foolbox_names().index(name)
    check_attack(name, EVERY_NORM[index // 2 % 3], Displacement(0.3) if index % 2 else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", foolbox_names())
def test_every_supported_attack_on_every_threat_and_goal(name: str) -> None:
    for threat in EVERY_NORM:
        check_attack(name, threat, None)
        check_attack(name, threat, Displacement(0.3))


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        ("foolbox:L2PGD", FrobeniusBall()),
        ("foolbox:DDN", FrobeniusBall(tokens=(1, 2))),
        ("foolbox:LinfPGD", PerTokenBall(norm="linf")),
        ("foolbox:LInfFMN", PerTokenBall(norm="linf")),
    ],
    ids=lambda value: str(getattr(value, "key", value)),
)
def test_attacks_in_their_own_norm_come_close(name: str, threat: MoveThreat) -> None:
    """The variables are scaled so that default step lengths fit, whatever the size of the tokens."""
    for case, goal in (("tiny-norms", None), ("large-norms", Displacement(0.1, relative=True))):
        problem = problem_of(case, threat, goal)
        ours = attack(problem).radius
        result = attack(problem, method=name, budget=AttackBudget(restarts=4, steps=30))
        assert result.status is Status.FOUND
        assert_at_most(result.radius, 1.25 * ours, what=f"{case} {problem.goal.key}")


def test_ball_factor_is_the_size_of_the_surrounding_ball() -> None:
    case = case_named("plain-h2-n3-d4")
    n, d = case.tokens.points.shape
    for threat in threats(case):
        moves = threat.project(10 * draw(2000, n, d), 1.0)
        corners = threat.project(1e3 * draw(2000, n, d).sign(), 1.0)
        for p in (1.0, 2.0, math.inf):
            bound = ball_factor(threat, n, d, p=p)
            lengths = torch.linalg.vector_norm(torch.cat([moves, corners]).flatten(1), ord=p, dim=1)
            assert_at_most(float(lengths.max()), bound, rtol=1e-12)


def test_batches_do_not_mix_and_seeds_repeat() -> None:
    problems = [problem_of("plain-h2-n3-d4", FrobeniusBall(), Displacement(0.1 + 0.05 * i)) for i in range(3)] + [
        problem_of("causal", FrobeniusBall())
    ]
    for name in ("foolbox:L2PGD", "foolbox:DDN"):
        torch.manual_seed(1)
        together = attack_many(problems, method=name, seed=3, budget=QUICK, batch_size=4)
        torch.manual_seed(2)  # the global stream neither matters nor moves
        before = torch.get_rng_state()
        alone = [attack(problem, method=name, seed=3, budget=QUICK) for problem in problems]
        assert_same_bits(torch.get_rng_state(), before)
        for one, other in zip(together, alone, strict=True):
            assert (one.radius, one.queries, one.usage) == (other.radius, other.queries, other.usage)
    assert attack(problems[0], method="foolbox:L2PGD", seed=4, budget=QUICK).radius != together[0].radius


def test_query_and_memory_budgets_hold() -> None:
    problem = problem_of("biases", FrobeniusBall(), Displacement(0.3))
    free = attack(problem, method="foolbox:DDN", budget=QUICK)
    chunked = attack(problem, method="foolbox:DDN", budget=replace(QUICK, memory_bytes=1))
    assert chunked.radius == pytest.approx(free.radius, rel=1e-9)
    short = attack(problem, method="foolbox:DDN", budget=AttackBudget(restarts=2, steps=60, queries=40))
    assert short.queries <= 40
    assert "queries are used up" in short.note


# ---- attacks that fail -------------------------------------------------------------------------------------------


class Fake(MinimizationAttack):
    """A foolbox attack whose ``run`` is given."""

    distance = l2

    def __init__(self, behaviour: Callable[..., Tensor]) -> None:
        self.behaviour = behaviour

    def run(self, model, inputs, criterion, *, early_stop=None, **kwargs):  # type: ignore[no-untyped-def]
        return type(inputs)(self.behaviour(model, inputs.raw))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    def install(behaviour: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(foolbox_library, "make_attack", lambda *_, **__: Fake(behaviour))

    return install


def rows_of(budget: AttackBudget = QUICK, *, epsilon: float | None = None, count: int = 3) -> list[AttackResult]:
    problems = [problem_of("plain-h2-n3-d4", FrobeniusBall(), Displacement(0.1 * (i + 1))) for i in range(count)]
    method = method_of(foolbox_entry("foolbox:DDN"))
    return run_many(method, problems, epsilon=epsilon, seed=0, budget=budget, batch_size=4)


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_nan_is_a_status(fake: Callable[[Callable[..., Tensor]], None], epsilon: float | None) -> None:
    fake(lambda _, x: torch.full_like(x, math.nan))
    for row in rows_of(epsilon=epsilon):
        assert row.status is Status.NAN
        assert "NaN" in row.note
        assert row.perturbed is None


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_zero_vectors_are_no_success(fake: Callable[[Callable[..., Tensor]], None], epsilon: float | None) -> None:
    fake(lambda _, x: torch.zeros_like(x))
    for row in rows_of(epsilon=epsilon):
        assert row.status is Status.NOT_FOUND
        assert "clean input" in row.note


def test_errors_and_wrong_shapes_are_statuses(fake: Callable[[Callable[..., Tensor]], None]) -> None:
    def broken(model: object, x: Tensor) -> Tensor:
        raise AssertionError

    fake(broken)
    assert {(row.status, row.note) for row in rows_of()} == {(Status.ERROR, "foolbox:DDN failed: AssertionError")}
    fake(lambda _, x: torch.cat([x, x], dim=1))
    for row in rows_of():
        assert row.status is Status.ERROR
        assert "shape" in row.note


@pytest.mark.parametrize("asks", [True, False], ids=["asking", "not asking"])
def test_an_attack_that_never_returns_is_a_timeout(fake: Callable[[Callable[..., Tensor]], None], asks: bool) -> None:
    def endless(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        while True:
            if asks:
                model(x)

    fake(endless)
    start = time.perf_counter()
    rows = rows_of(replace(QUICK, seconds=1.0))
    assert time.perf_counter() - start < 60  # it came back at all
    for row in rows:
        assert row.status is Status.TIMEOUT
        assert "did not return" in row.note
    fake(lambda _, x: x + 1.0)  # and what follows works
    assert all(row.status is Status.FOUND for row in rows_of())


def test_one_failing_input_leaves_the_others_alone(fake: Callable[[Callable[..., Tensor]], None]) -> None:
    calls = []

    def second_fails(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            return torch.full_like(x, math.inf)
        return x + 2.0

    fake(second_fails)
    assert [row.status for row in rows_of()] == [Status.FOUND, Status.NAN, Status.FOUND]


def test_what_was_asked_about_is_not_lost(fake: Callable[[Callable[..., Tensor]], None]) -> None:
    """An attack that met a violation and then fails: the violation is verified and kept, the failure noted."""

    def meets_and_fails(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        model(x + 5.0)
        raise RuntimeError("later")

    fake(meets_and_fails)
    for row in rows_of():
        assert row.status is Status.FOUND
        assert row.note == "foolbox:DDN failed: RuntimeError: later"


def test_the_callers_gradients_and_weights_are_untouched() -> None:
    problem = problem_of("plain-h2-n3-d4", FrobeniusBall())
    attack(problem, method="foolbox:L2PGD", budget=QUICK)
    assert problem.network.w_q.grad is None  # type: ignore[attr-defined]
    assert problem.clean.points.grad is None
    shifted = Problem(problem.network, TokenMeasure(problem.clean.points), problem.threat, problem.goal)
    assert shifted.digest == problem.digest
