"""Rows about smoothed decisions: a model of its own, in records of its own."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from attnrobust.errors import AlreadyViolatedError, AttnRobustError
from attnrobust.problem import Problem
from attnrobust.runs.evaluate import LONGEST_MESSAGE, RowTask
from attnrobust.runs.work import Workbench
from attnrobust.smoothing.record import SmoothedComparison, Smoothing
from attnrobust.smoothing.smooth import smooth
from attnrobust.text import shortened

FOUND, CERTIFIED, ABSTAINED, MISCLASSIFIED, ERROR = "found", "certified", "abstained", "misclassified", "error"


@dataclass(frozen=True)
class SmoothedRow:
    """One input: what is known about the smoothed decision, or why nothing is.

    Args:
        input_id: The input's name in files.
        layer: The layer's name, or the depth at which tokens move.
        threat: Key of the threat.
        goal: The decision that is smoothed.
        status: "found" (an attack), "certified" (none found), "abstained" (the votes cannot tell), "misclassified" (the
            model itself decides otherwise than the label says), or "error".
        n: Tokens; 0 where they could not be computed.
        text: The sentence, if there is one.
        label: Name of the model's own class without noise.
        majority: Name of the smoothed decision; None on abstention.
        answer: Both radii and everything behind them; None where there is no answer.
        message: Why there is no answer.
    """

    input_id: str
    layer: str
    threat: str
    goal: str
    status: str
    n: int = 0
    text: str | None = None
    label: str | None = None
    majority: str | None = None
    answer: SmoothedComparison | None = None
    message: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is infinite or missing is null."""
        row: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "answer"}
        row["model"] = "smoothed"
        if self.answer is None:
            return row
        values = asdict(self.answer)
        sampling = values.pop("smoothing")
        del values["label"], values["majority"]
        numbers = {name: _finite(value) for name, value in (values | {"gap": self.answer.gap}).items()}
        return {**row, **sampling, **numbers}

    @property
    def certified_radius(self) -> float | None:
        """Of the smoothed decision; None where there is no answer."""
        return None if self.answer is None else self.answer.certified_radius

    @property
    def attack_radius(self) -> float | None:
        """Of the smoothed decision; None where no attack was found."""
        return self.answer.attack_radius if self.answer is not None and self.status == FOUND else None


def smoothed_rows(bench: Workbench, smoothing: Smoothing) -> Iterator[SmoothedRow]:
    """Smooth the decision of every item of a run; whatever goes wrong is the status of its row.

    Args:
        bench: The inputs, depths, threats and decisions.
        smoothing: The noise and how it is sampled.
    """
    for item in bench.items():
        source, goal = bench.sources[item.source], bench.goals[item.goal]
        try:
            task = bench.task(item)
            yield _row(task, smoothing, seed=bench.config.seed)
        except AttnRobustError as error:
            status = MISCLASSIFIED if isinstance(error, AlreadyViolatedError) else ERROR
            yield SmoothedRow(
                source.id, item.layer, item.threat, goal.key, status, text=source.text,
                message=shortened(str(error), LONGEST_MESSAGE),
            )  # fmt: skip


def _row(task: RowTask, smoothing: Smoothing, *, seed: int) -> SmoothedRow:
    problem = Problem(task.network, task.clean, task.threat, task.goal)
    answer = smooth(problem, smoothing, seed=seed)
    name = task.class_name or str
    majority = None if answer.majority is None else name(answer.majority)
    return SmoothedRow(
        task.input_id, task.layer, task.threat.key, task.goal_key or task.goal.key, _status(answer), n=task.clean.n,
        text=task.text, label=name(answer.label), majority=majority, answer=answer,
    )  # fmt: skip


def _status(answer: SmoothedComparison) -> str:
    if answer.abstained:
        return ABSTAINED
    return FOUND if math.isfinite(answer.attack_radius) else CERTIFIED


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
