"""How one row is computed, and how a failure becomes a status instead of an end."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch

from attnrobust.attacks import DEFAULT_ATTACK, AttackBudget, attack_for, token_radii
from attnrobust.attacks import attack as run_attack
from attnrobust.certify import METHODS, certify_with, method_named
from attnrobust.certify.contest import certify_what_can_win
from attnrobust.certify.method import UNCOVERED
from attnrobust.comparison import UnsoundError, join
from attnrobust.errors import AlreadyViolatedError, AttnRobustError, InputError
from attnrobust.goals import Goal, Margin
from attnrobust.models.networks.confirmation import Confirmation
from attnrobust.problem import Problem, TokenMap
from attnrobust.results import AttackResult, CertificationReport, Kind, Status
from attnrobust.runs import activity
from attnrobust.runs.config import RunConfig
from attnrobust.runs.rows import CertificateEntry, Row
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import MoveThreat
from attnrobust.tokens import TokenMeasure

LONGEST_MESSAGE = 400
"""Characters of a row's message; foreign errors can be pages long."""

TOKEN_BUDGET = AttackBudget(restarts=2, steps=20, rounds=1)
"""What each single token's attack may cost: its radius ranks tokens, so a few per cent more do no harm."""

log = logging.getLogger(__name__)


READOUT_SCOPE = "the readout acts on the output of this attention layer; it is not the decision of the model"
INSTEAD = "which has a head: give --at {depth} --goal decision in place of --layer and --readout to ask about that"

Confirm = Callable[[AttackResult], Confirmation]
"""Looks at an attack's point through the user's own model."""


@dataclass(frozen=True, eq=False)
class RowTask:
    """The work of one row, before a problem can be built from it.

    Args:
        input_id: The input's name in files.
        layer: The layer's name, or the depth of a whole model.
        network: The layer, or the model from that depth on.
        clean: The clean tokens.
        threat: What may change.
        goal: What must stay true.
        text: The sentence, if there is one.
        tokens: The n token strings, or empty.
        row_id: See ``Row``.
        goal_key: The goal's name in rows; None takes the goal's own.
        scope: See ``Row.goal_scope``.
        class_name: Readable names of classes; None where there are none.
        confirm: Evaluates the attack's point through the user's own model; None for layers.
        word_distance: See ``Row``.
    """

    input_id: str
    layer: str
    network: TokenMap
    clean: TokenMeasure
    threat: Threat
    goal: Goal
    text: str | None = None
    tokens: tuple[str, ...] = ()
    row_id: str | None = None
    goal_key: str | None = None
    scope: str | None = None
    class_name: Callable[[int], str] | None = None
    confirm: Confirm | None = None
    word_distance: float | None = None


def goal_scope(goal: Goal, *, instead: str | None = None) -> str | None:
    """What a layer's goal is about where its name may suggest more: a margin here is one of the layer's output.

    Args:
        goal: The goal.
        instead: The depth from which on the model's own decision can be asked about, where it has one.
    """
    if not isinstance(goal, Margin):
        return None
    return READOUT_SCOPE + ("" if instead is None else ", " + INSTEAD.format(depth=instead))


def evaluate_row(task: RowTask, config: RunConfig) -> Row:
    """Certify and attack one input; whatever goes wrong becomes the row's status and message.

    Args:
        task: The input with its layer, threat and goal.
        config: Which certificates, which attack and at what cost; the seed, which attacks mix with the problem, so no
            row depends on its neighbours.

    Returns:
        A row; it never raises except on KeyboardInterrupt and the like.
    """
    values: dict[str, Any] = {}
    try:
        problem = _posed(task)
        values |= _problem_values(problem) | _label(problem, task)
        _answer(problem, task, config, values)
    except AlreadyViolatedError as error:
        values |= _misclassified(task, config, _already(error, task))
    except UnsoundError as error:
        values |= {"status": Status.UNSOUND, "gap": _finite(error.comparison.gap), "message": str(error)}
    except Exception as error:  # one bad input must not end the others; the message is in its row
        log.debug("row %s failed", task.input_id, exc_info=True)
        values |= {"status": Status.ERROR, "message": _one_line(error)}
    return Row(
        input_id=task.input_id, layer=task.layer, n=task.clean.n, threat=task.threat.key,
        goal=task.goal_key or task.goal.key, goal_scope=task.scope, seed=config.seed, text=task.text,
        tokens=task.tokens, row_id=task.row_id, word_distance=task.word_distance, **values,
    )  # fmt: skip


def _posed(task: RowTask) -> Problem:
    """The problem; a margin of a decision that rounding may have made is told as what it is."""
    try:
        return Problem(task.network, task.clean, task.threat, task.goal)
    except AlreadyViolatedError:
        raise
    except InputError as error:
        if task.class_name is None or not str(error).startswith("the budget "):
            raise
        cause = str(error).removeprefix("the budget ").partition(";")[0]
        raise InputError(
            f"the decision is on its boundary at the clean input: its margin {cause}; give another input"
        ) from error


def _answer(problem: Problem, task: RowTask, config: RunConfig, values: dict[str, Any]) -> None:
    """Fill ``values`` step by step, so that a later failure keeps what was computed before it."""
    begin = partial(activity.now, task.input_id, task.layer)
    attacked = _attacked(problem, task, config, begin) if config.attack.method is not None else None
    certification = None
    if config.certifies:
        certification = certify_row(problem, config, attacked, begin)
        values |= _certificate_values(certification) | {"status": Status.CERTIFIED, "problem": certification.problem}
        values["message"] = _why_none(certification) or None
    if attacked is None:
        return
    values["attack"] = _attack_name(task, config.attack.method or DEFAULT_ATTACK)
    if isinstance(attacked, Exception):
        raise attacked
    result = attacked
    values |= _attack_values(problem, result) | _attack_label(problem, result, task)
    values |= {"status": result.status, "message": result.note or values.get("message"), "problem": result.problem}
    if certification is not None:
        values["gap"] = _finite(join(problem, result, certification).gap)
    if task.confirm is not None and result.status is Status.FOUND:
        values |= _confirmed(task.confirm, result, values.get("message"))
    if config.attack.token_radii and isinstance(task.threat, MoveThreat):
        values["token_radii"] = _token_radii(problem, task.threat, config)


def _token_radii(problem: Problem, threat: MoveThreat, config: RunConfig) -> tuple[float | None, ...]:
    """The attack radius of every movable token alone, from one short batched search."""
    movable = threat.movable(problem.clean.n)
    found = token_radii(problem, tokens=movable.nonzero().flatten().tolist(), seed=config.seed, budget=TOKEN_BUDGET)
    radii = iter(_finite(one.radius) if one.status is Status.FOUND else None for one in found)
    return tuple(next(radii) if moves else None for moves in movable.tolist())


def _attacked(
    problem: Problem, task: RowTask, config: RunConfig, begin: Callable[[str], None]
) -> AttackResult | Exception:
    """The attack's result; what it raises is kept until the certificates, which do not depend on it, are there."""
    name = _attack_name(task, config.attack.method or DEFAULT_ATTACK)
    begin(f"attack {name}")
    try:
        return run_attack(
            problem, method=name, epsilon=config.attack.epsilon, seed=config.seed, budget=config.attack.budget()
        )
    except Exception as error:  # noqa: BLE001 - raised again by the caller, after the certificates
        return error


def certify_row(
    problem: Problem, config: RunConfig, attacked: AttackResult | Exception | None, begin: Callable[[str], None]
) -> CertificationReport:
    """The certificates that are named; else those that can win where a violation is known, and all where none is."""
    named, seed = config.named_certificates, config.seed

    def watch(name: str) -> None:
        begin(f"certificate {name}")

    if named is not None:
        return certify_with(problem, [method_named(name) for name in named], seed=seed, watch=watch)
    found = isinstance(attacked, AttackResult) and attacked.status is Status.FOUND and attacked.epsilon is None
    if not found or config.certificates is not None:
        return certify_with(problem, METHODS, seed=seed, named=False, watch=watch)
    assert isinstance(attacked, AttackResult)  # noqa: S101 - found says so; narrows the type
    return certify_what_can_win(problem, METHODS, attack_radius=attacked.radius, seed=seed, watch=watch)


def _problem_values(problem: Problem) -> dict[str, Any]:
    budget = float(problem.resolved.budgets.min())
    name = "tolerance" if problem.resolved.functionals is None else "margin"
    norm = float(torch.linalg.vector_norm(problem.clean.points))
    token = float(torch.linalg.vector_norm(problem.clean.points, dim=-1).median())
    return {name: budget, "problem": problem.digest, "input_norm": norm, "token_norm": token}


def _confirmed(confirm: Confirm, result: AttackResult, message: str | None) -> dict[str, Any]:
    """What changes once the user's own model was given the attack's point: nothing where it agrees."""
    try:
        seen = confirm(result)
    except AttnRobustError as error:
        return _not_confirmed(result, str(error))
    if seen.status is Status.DISAGREES:
        return _not_confirmed(result, seen.message)
    return {"message": "; ".join(part for part in (message, seen.message) if part) or None}


def _not_confirmed(result: AttackResult, reason: str) -> dict[str, Any]:
    """The radius is one of the specification only, so it is told and not counted."""
    message = f"the violation at radius {result.radius:.6g} is not one of the model itself: {reason}"
    return {"status": Status.DISAGREES, "attack_radius": None, "attack_label": None, "gap": None, "message": message}


def _label(problem: Problem, task: RowTask) -> dict[str, Any]:
    label = problem.resolved.label
    return {} if task.class_name is None or label is None else {"label": task.class_name(label)}


def _attack_label(problem: Problem, result: AttackResult, task: RowTask) -> dict[str, Any]:
    """The strongest of the other classes at the attack's point; on the boundary itself it ties with the label."""
    goal, resolved = problem.goal, problem.resolved
    if task.class_name is None or result.perturbed is None or not isinstance(goal, Margin) or result.atoms is not None:
        return {}
    if result.status is not Status.FOUND or resolved.weights is None:
        return {}
    logits = goal.logits(resolved.weights @ problem.network(result.perturbed, problem.mass))
    others = list(resolved.classes)
    return {"attack_label": task.class_name(others[int(logits[others].argmax())])}


def _why_none(report: CertificationReport) -> str:
    """Why nothing is certified: what the methods say that speak about such problems, else one by name.

    That one misses a feature of the layer or network, if any does; else it is the first.
    """
    if report.certificates or any(entry.declared for entry in report.skipped) or not report.skipped:
        return report.why_none
    near = (entry for entry in report.skipped if entry.reason.startswith(UNCOVERED))
    first, others = next(near, report.skipped[0]), len(report.skipped) - 1
    more = f"; {others} more do not apply either" if others else ""
    return f"no certificate: {first.method}: {first.reason}{more}"


def _certificate_values(report: CertificationReport) -> dict[str, Any]:
    best = report.best
    return {
        "certificate": None if best is None else best.method,
        "certificate_kind": None if best is None else str(best.kind),
        "certified_radius": 0.0 if best is None else best.radius,
        "seconds_certify": report.seconds,
        "certificates": {
            c.method: CertificateEntry(c.radius, str(c.kind), c.failure_probability, c.seconds)
            for c in report.certificates
        },
        "skipped": {s.method: s.reason for s in report.skipped},
    }


def _attack_values(problem: Problem, result: AttackResult) -> dict[str, Any]:
    moves: tuple[float, ...] = ()
    if result.perturbed is not None and result.perturbed.shape == problem.clean.points.shape:
        moves = tuple(torch.linalg.vector_norm(result.perturbed - problem.clean.points, dim=-1).tolist())
    return {
        "attack": result.attack,
        "attack_radius": _finite(result.radius) if result.status is Status.FOUND else None,
        "seconds_attack": result.seconds,
        "epsilon": result.epsilon,
        "usage": _finite(result.usage),
        "queries": result.queries,
        "token_moves": moves,
    }


def _attack_name(task: RowTask, name: str) -> str:
    """The attack's name in tables: that of the threat's own attack in place of the default."""
    return attack_for(task.threat).name if name == DEFAULT_ATTACK else name


def _misclassified(task: RowTask, config: RunConfig, message: str) -> dict[str, Any]:
    """Both radii are 0: the goal fails without any move."""
    values: dict[str, Any] = {"status": Status.MISCLASSIFIED, "message": message}
    if config.certifies:
        values |= {"certified_radius": 0.0, "certificate_kind": str(Kind.FLOAT64)}
    if config.attack.method is not None:
        values |= {"attack": _attack_name(task, config.attack.method), "attack_radius": 0.0}
    return values


def _already(error: AlreadyViolatedError, task: RowTask) -> str:
    """Why the goal fails at the clean input; a decision that is not asked to be another one is on its boundary."""
    if task.class_name is None or not isinstance(task.goal, Margin) or task.goal.label is not None:
        return str(error)
    return f"two classes tie at the clean input, so the decision is on its boundary ({error}); give another input"


def _one_line(error: Exception) -> str:
    """One line; the traceback is in the log."""
    text = str(error) if isinstance(error, AttnRobustError) else f"{type(error).__name__}: {error}"
    return shorten(text, LONGEST_MESSAGE, placeholder=" ...")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
