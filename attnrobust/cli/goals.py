"""From the options of a command to the goals of a configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnrobust.runs.reading import require_goal_options

TAKES = {"tolerance": {"hidden", "pooled"}, "anchors": {"nearest"}, "row": {"decision", "hidden"}}
"""Which of several goals an option is for."""


def one_goal(
    goal: str | None,
    anchors: Path | None,
    tolerance: str | None,
    readout: Path | None,
    pool: str | None,
    label: int | None,
    row: int | None,
) -> dict[str, Any]:
    """The one goal of a command.

    Raises:
        InputError: Options of different goals, or a value that cannot be read.
    """
    values = {
        "goal": goal, "anchors": anchors, "tolerance": tolerance, "readout": readout, "pool": pool, "label": label,
        "row": row,
    }  # fmt: skip
    require_goal_options(**values)  # type: ignore[arg-type]
    return values


def many_goals(
    goals: Sequence[str] | None, tolerances: Sequence[str] | None, anchors: Path | None, row: int | None
) -> list[dict[str, Any]] | None:
    """The goals of a run: every name, those with a tolerance at each of the tolerances; None where nothing is given.

    Raises:
        InputError: A tolerance, anchors or a row that no goal takes.
    """
    if not goals:
        nothing = not tolerances and anchors is None and row is None
        return None if nothing else [one_goal(None, anchors, t, None, None, None, row) for t in tolerances or (None,)]
    found = []
    for goal in goals:
        own, token = (_taken(name, value, goal, goals) for name, value in (("anchors", anchors), ("row", row)))
        amounts: Sequence[str | None] = _taken("tolerance", tolerances, goal, goals) or [None]
        found += [one_goal(goal, own, amount, None, None, None, token) for amount in amounts]
    return found


def _taken(option: str, value: Any, goal: str, goals: Sequence[str]) -> Any:
    """The value for a goal that takes the option; for every goal, which then refuses it, where none does."""
    return value if goal in TAKES[option] or not TAKES[option] & set(goals) else None
