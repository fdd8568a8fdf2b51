"""What the package says to the problems of the recorded set, as plain values for JSON.

Floats are written by ``repr``, which is exact, and radii and usages by ``float.hex`` as well. ``pose`` is the one place
that knows how a threat on token measures is handed over.
"""

import dataclasses
import hashlib
import inspect
import math
import time
import typing
from collections.abc import Callable
from typing import Any

from torch import Tensor

import attnrobust as ar
from benchmarks.recorded_questions import SHARED, Question, questions

MEASURES = (ar.CouplingBall, ar.WassersteinBall, ar.Copies)


@dataclasses.dataclass(frozen=True)
class Posed:
    """A problem, and what ``compare`` and ``certify`` take beside it."""

    problem: ar.Problem
    beside: dict[str, Any]


def pose(question: Question) -> Posed:
    """The problem of a question; a threat on token measures goes beside it where ``compare`` takes one."""
    layer, clean, threat, goal = question.layer, question.clean, question.threat, question.goal
    if not isinstance(threat, MEASURES):
        return Posed(ar.Problem(layer, clean, threat, goal), {})
    if "threat" in inspect.signature(ar.compare).parameters:
        return Posed(ar.Problem(layer, clean, question.moves, goal), {"threat": threat})
    if isinstance(threat, ar.Copies) and question.moves != SHARED:
        changes: dict[str, Any] = {"moves": question.moves}
        threat = dataclasses.replace(threat, **changes)
    return Posed(ar.Problem(layer, clean, typing.cast("ar.Threat", threat), goal), {})


def recorded(work: Callable[[], Any]) -> Any:
    """What the work returns, or its error by name and message: an error is an answer too."""
    try:
        return work()
    except ar.UnsoundError as error:
        return {"error": "UnsoundError", **comparison_record(error.comparison)}
    except Exception as error:  # noqa: BLE001 - a record goes on, and compare shows what became an error
        return {"error": type(error).__name__, "message": str(error)}


def fingerprint(value: Tensor | None) -> str | None:
    """A short hash of every bit of a tensor."""
    if value is None:
        return None
    array = value.detach().contiguous().numpy()
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def number(name: str, value: float) -> dict[str, Any]:
    """A float by repr and by hex."""
    return {name: value, f"{name}_hex": float(value).hex()}


# ---- records of the package ------------------------------------------------------------------------------------------


def attack_record(result: ar.AttackResult) -> dict[str, Any]:
    values = {
        "digest": result.problem,
        "attack": result.attack,
        "status": str(result.status),
        **number("radius", result.radius),
        **number("usage", result.usage),
        "queries": result.queries,
        "seed": result.seed,
        "epsilon": result.epsilon,
        "note": result.note,
        "point": fingerprint(result.perturbed),
    }
    atoms = getattr(result, "atoms", None)
    if hasattr(result, "moving_radius"):
        values |= number("moving_radius", result.moving_radius)
        parts = () if atoms is None else (atoms.points, atoms.mass, atoms.parent)
        values["atoms"] = [fingerprint(part) for part in parts]
    return values


def certification_record(report: ar.CertificationReport) -> dict[str, Any]:
    best = report.best
    return {
        "digest": report.problem,
        "best": None if best is None else best.method,
        "certificates": {
            c.method: {
                "digest": c.problem,
                **number("radius", c.radius),
                "kind": str(c.kind),
                "failure_probability": c.failure_probability,
                "evaluations": c.evaluations,
                "seconds": c.seconds,
            }
            for c in report.certificates
        },
        "skipped": {entry.method: entry.reason for entry in report.skipped},
    }


def comparison_record(found: ar.Comparison) -> dict[str, Any]:
    return {
        "digest": found.problem,
        "status": str(found.status),
        "gap": found.gap,
        **certification_record(found.certification),
        "attack": attack_record(found.attack),
    }


# ---- problems --------------------------------------------------------------------------------------------------------


def answer(question: Question) -> dict[str, Any]:
    """Everything that is recorded about one problem."""
    start = time.perf_counter()
    values: dict[str, Any] = recorded(lambda: _answer(question))
    return values | {"seconds": round(time.perf_counter() - start, 3)}


def _answer(question: Question) -> dict[str, Any]:
    posed = pose(question)
    values: dict[str, Any] = recorded(
        lambda: comparison_record(ar.compare(posed.problem, seed=question.seed, budget=question.budget, **posed.beside))
    )
    if question.extra:
        values["on request"] = recorded(
            lambda: certification_record(
                ar.certify(posed.problem, methods=question.extra, seed=question.seed, **posed.beside)
            )
        )
    if question.epsilon is not None:
        values["fixed size"] = recorded(
            lambda: attack_record(
                ar.attack(posed.problem, epsilon=question.epsilon, seed=question.seed, budget=question.budget)
            )
        )
    return values


def problem_records(match: str = "") -> dict[str, Any]:
    """Name of every problem whose name holds the text, and what is said about it."""
    return {question.name: answer(question) for question in questions() if match in question.name}


def coverage(problems: dict[str, Any]) -> dict[str, int]:
    """How many problems have a positive finite radius by each certificate."""
    counts: dict[str, int] = {}
    for values in problems.values():
        for place in (values, values.get("on request", {})):
            for name, entry in place.get("certificates", {}).items():
                counts[name] = counts.get(name, 0) + (0.0 < entry["radius"] < math.inf)
    return dict(sorted(counts.items()))
