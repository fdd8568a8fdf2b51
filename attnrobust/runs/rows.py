"""One row per input: what tables, files and plots show, and how a failure becomes a status instead of an end."""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any

import torch

from attnrobust.attacks import DEFAULT_ATTACK, DEFAULT_BUDGET, AttackBudget, attack_for
from attnrobust.attacks import attack as run_attack
from attnrobust.certify import certify
from attnrobust.comparison import UnsoundError, join
from attnrobust.errors import AlreadyViolatedError, AttnRobustError
from attnrobust.goals import Goal
from attnrobust.problem import Problem, TokenMap
from attnrobust.results import AttackResult, CertificationReport, Kind, Status
from attnrobust.threats.base import Threat
from attnrobust.tokens import TokenMeasure

SCHEMA_VERSION = 1
"""Version of the row fields; raised when a field changes its meaning or goes away."""

LONGEST_MESSAGE = 400
"""Characters of a row's message; foreign errors can be pages long."""

log = logging.getLogger(__name__)


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
        seed: Seed of the run; attacks mix the problem into it, so no row depends on its neighbours.
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
    seed: int = 0
    text: str | None = None
    tokens: tuple[str, ...] = ()
    row_id: str | None = None


@dataclass(frozen=True)
class RowOptions:
    """What to compute for every row.

    Args:
        certify: Whether to run certificates.
        methods: Names of certificates; None means all that apply.
        attack: Name of the attack ("default" for the threat's own), or None for certificates alone.
        epsilon: Fixed budget of the attack; None searches the smallest radius.
        budget: What the attack may cost.
    """

    certify: bool = True
    methods: tuple[str, ...] | None = None
    attack: str | None = DEFAULT_ATTACK
    epsilon: float | None = None
    budget: AttackBudget = DEFAULT_BUDGET


@dataclass(frozen=True)
class CertificateEntry:
    """One certificate in a row: radius, kind, failure probability, seconds."""

    radius: float
    kind: str
    failure_probability: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """The result for one input; None stands for "not there" (not run, none found, or no finite value).

    Args:
        input_id: The input's name.
        layer: The layer's name.
        n: Number of tokens.
        threat: The threat's key; radii are in its distance, in units of the token vectors.
        goal: The goal's key.
        tolerance: Allowed displacement, absolute; None for a margin.
        margin: Smallest clean margin over the classes; None for a displacement.
        certificate: Name of the best certificate.
        certificate_kind: Its kind.
        certified_radius: Its radius, a lower bound of the robust radius; 0 where nothing is certified.
        attack: Name of the attack.
        attack_radius: Verified radius, an upper bound of the robust radius; None if no violation was found.
        status: A ``Status``.
        gap: attack_radius / certified_radius.
        seconds_certify: Wall time of all certificates.
        seconds_attack: Wall time of the attack.
        seed: Seed of the run; ``compare(problem, seed=seed)`` repeats the row.
        certificates: Every certificate by name.
        skipped: Certificates that do not apply, with their reason.
        epsilon: Fixed budget of the attack, if one was given.
        usage: Used share of the goal's budget at the attack's point (a violation has >= 1).
        queries: Forward evaluations of the attack.
        message: What went wrong (statuses error, misclassified, unsound), or why nothing is certified.
        problem: Digest of the problem.
        text: The sentence.
        tokens: The token strings.
        token_moves: l2 norm of each token's move in the attack's point.
        input_norm: Frobenius norm of the clean tokens, to judge radii by.
        row_id: Digest that names the row in a run of many; None elsewhere.
    """

    input_id: str
    layer: str
    n: int
    threat: str
    goal: str
    tolerance: float | None = None
    margin: float | None = None
    certificate: str | None = None
    certificate_kind: str | None = None
    certified_radius: float | None = None
    attack: str | None = None
    attack_radius: float | None = None
    status: str = Status.ERROR
    gap: float | None = None
    seconds_certify: float | None = None
    seconds_attack: float | None = None
    seed: int = 0
    certificates: dict[str, CertificateEntry] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    usage: float | None = None
    queries: int | None = None
    message: str | None = None
    problem: str | None = None
    text: str | None = None
    tokens: tuple[str, ...] = ()
    token_moves: tuple[float, ...] = ()
    input_norm: float | None = None
    row_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and Parquet, in the order of the fields."""
        return asdict(self) | {"tokens": list(self.tokens), "token_moves": list(self.token_moves)}


def without_times(rows: Iterable[Row]) -> list[Row]:
    """Rows without their seconds: equal for two runs with the same inputs and options."""
    return [
        replace(
            row,
            seconds_certify=None,
            seconds_attack=None,
            certificates={name: replace(entry, seconds=0.0) for name, entry in row.certificates.items()},
        )
        for row in rows
    ]


def evaluate_row(task: RowTask, options: RowOptions = RowOptions()) -> Row:
    """Certify and attack one input; whatever goes wrong becomes the row's status and message.

    Args:
        task: The input with its layer, threat and goal.
        options: What to compute.

    Returns:
        A row; it never raises except on KeyboardInterrupt and the like.
    """
    values: dict[str, Any] = {}
    try:
        problem = Problem(task.network, task.clean, task.threat, task.goal)
        values |= _problem_values(problem)
        _run(problem, task, options, values)
    except AlreadyViolatedError as error:
        values |= _misclassified(task, options, str(error))
    except UnsoundError as error:
        values |= {"status": Status.UNSOUND, "gap": _finite(error.comparison.gap), "message": str(error)}
    except Exception as error:  # one bad input must not end the others; the message is in its row
        log.debug("row %s failed", task.input_id, exc_info=True)
        values |= {"status": Status.ERROR, "message": _told(error)}
    return Row(
        input_id=task.input_id, layer=task.layer, n=task.clean.n, threat=task.threat.key, goal=task.goal.key,
        seed=task.seed, text=task.text, tokens=task.tokens, row_id=task.row_id, **values,
    )  # fmt: skip


def _run(problem: Problem, task: RowTask, options: RowOptions, values: dict[str, Any]) -> None:
    """Fill ``values`` step by step, so that a later failure keeps what was computed before it."""
    certification = None
    if options.certify:
        certification = certify(problem, methods=options.methods, seed=task.seed)
        values |= _certificate_values(certification) | {"status": Status.CERTIFIED, "problem": certification.problem}
        values["message"] = certification.why_none or None
    if options.attack is None:
        return
    values["attack"] = name = _attack_name(task, options.attack)
    result = run_attack(problem, method=name, epsilon=options.epsilon, seed=task.seed, budget=options.budget)
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


def _misclassified(task: RowTask, options: RowOptions, message: str) -> dict[str, Any]:
    """Both radii are 0: the goal fails without any move."""
    values: dict[str, Any] = {"status": Status.MISCLASSIFIED, "message": message}
    if options.certify:
        values |= {"certified_radius": 0.0, "certificate_kind": str(Kind.FLOAT64)}
    if options.attack is not None:
        values |= {"attack": _attack_name(task, options.attack), "attack_radius": 0.0}
    return values


def _told(error: Exception) -> str:
    """One line; the traceback is in the log."""
    text = str(error) if isinstance(error, AttnRobustError) else f"{type(error).__name__}: {error}"
    return shorten(text, LONGEST_MESSAGE, placeholder=" ...")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
