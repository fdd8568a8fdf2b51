"""How one row is computed, and how a failure becomes a status instead of an end."""

import logging
import math
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch

from attnrobust.attacks import DEFAULT_ATTACK, attack_for
from attnrobust.attacks import attack as run_attack
from attnrobust.certify import certify
from attnrobust.comparison import UnsoundError, join
from attnrobust.errors import AlreadyViolatedError, AttnRobustError
from attnrobust.goals import Goal, Margin
from attnrobust.problem import Problem, TokenMap
from attnrobust.results import AttackResult, CertificationReport, Kind, Status
from attnrobust.runs.config import RunConfig
from attnrobust.runs.rows import CertificateEntry, Row
from attnrobust.threats.base import Threat
from attnrobust.tokens import TokenMeasure

LONGEST_MESSAGE = 400
"""Characters of a row's message; foreign errors can be pages long."""

log = logging.getLogger(__name__)


READOUT_SCOPE = "the readout acts on the output of this attention layer; it is not the decision of the model"


@dataclass(frozen=True, eq=False)
class RowTask:
    """The work of one row, before a problem can be built from it.

    Args:
        input_id: The input's name in files.
        layer: The layer's name.
        network: The layer.
        clean: The clean tokens.
        threat: What may change.
        goal: What must stay true.
        text: The sentence, if there is one.
        tokens: The n token strings, or empty.
        row_id: See ``Row``.
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


def goal_scope(goal: Goal) -> str | None:
    """What a goal is about where its name may suggest more: a margin here is one of a layer's output."""
    return READOUT_SCOPE if isinstance(goal, Margin) else None


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
        problem = Problem(task.network, task.clean, task.threat, task.goal)
        values |= _problem_values(problem)
        _answer(problem, task, config, values)
    except AlreadyViolatedError as error:
        values |= _misclassified(task, config, str(error))
    except UnsoundError as error:
        values |= {"status": Status.UNSOUND, "gap": _finite(error.comparison.gap), "message": str(error)}
    except Exception as error:  # one bad input must not end the others; the message is in its row
        log.debug("row %s failed", task.input_id, exc_info=True)
        values |= {"status": Status.ERROR, "message": _one_line(error)}
    return Row(
        input_id=task.input_id, layer=task.layer, n=task.clean.n, threat=task.threat.key, goal=task.goal.key,
        goal_scope=goal_scope(task.goal), seed=config.seed, text=task.text, tokens=task.tokens, row_id=task.row_id,
        **values,
    )  # fmt: skip


def _answer(problem: Problem, task: RowTask, config: RunConfig, values: dict[str, Any]) -> None:
    """Fill ``values`` step by step, so that a later failure keeps what was computed before it."""
    certification = None
    if config.certifies:
        certification = certify(problem, methods=config.certificates, seed=config.seed)
        values |= _certificate_values(certification) | {"status": Status.CERTIFIED, "problem": certification.problem}
        values["message"] = certification.why_none or None
    if config.attack.method is None:
        return
    values["attack"] = name = _attack_name(task, config.attack.method)
    result = run_attack(
        problem, method=name, epsilon=config.attack.epsilon, seed=config.seed, budget=config.attack.budget()
    )
    values |= _attack_values(problem, result)
    values |= {"status": result.status, "message": result.note or values.get("message"), "problem": result.problem}
    if certification is not None:
        values["gap"] = _finite(join(problem, result, certification).gap)


def _problem_values(problem: Problem) -> dict[str, Any]:
    budget = float(problem.resolved.budgets.min())
    name = "tolerance" if problem.resolved.functionals is None else "margin"
    norm = float(torch.linalg.vector_norm(problem.clean.points))
    return {name: budget, "problem": problem.digest, "input_norm": norm}


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


def _one_line(error: Exception) -> str:
    """One line; the traceback is in the log."""
    text = str(error) if isinstance(error, AttnRobustError) else f"{type(error).__name__}: {error}"
    return shorten(text, LONGEST_MESSAGE, placeholder=" ...")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
