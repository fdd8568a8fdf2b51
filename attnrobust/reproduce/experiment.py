"""What an experiment is: parts to compute, a table, a figure, and a verdict about the paper's statement."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from attnrobust.reports.curves import Panel

Value = str | int | float | None
Row = dict[str, Value]
"""One line of the table; numbers that are not finite are None."""

T = TypeVar("T")


class Size(StrEnum):
    """How much is computed."""

    TINY = "tiny"
    """Seconds: shows that everything runs, nothing else."""
    DEFAULT = "default"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the user chooses.

    Args:
        size: How much is computed.
        seed: Seed of everything random.
    """

    size: Size = Size.DEFAULT
    seed: int = 0

    def pick(self, tiny: T, default: T, full: T) -> T:
        """The one of three that belongs to the size."""
        return {Size.TINY: tiny, Size.DEFAULT: default, Size.FULL: full}[self.size]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece that is computed and stored on its own.

    Args:
        name: File name of its rows.
        config: Everything that its rows depend on, besides the seed.
        compute: Computes the rows.
    """

    name: str
    config: Mapping[str, Value]
    compute: Callable[[], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One statement of the paper beside what was measured.

    Args:
        claim: The statement.
        paper: The paper's number or form.
        ours: What was measured.
        agrees: Whether it agrees; None where the sizes at hand cannot tell.
        reason: Why it does or does not.
    """

    claim: str
    paper: str
    ours: str
    agrees: bool | None
    reason: str

    @property
    def word(self) -> str:
        """Agrees, differs, or open."""
        return "open" if self.agrees is None else "agrees" if self.agrees else "differs"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment of a paper.

    Args:
        name: Name of the command's argument.
        paper: Where it comes from.
        statement: What is shown, in one line.
        minutes: What it takes on one core: default and ``--full``.
        parts: What is computed.
        panels: The fields of the figure, from all rows.
        verdicts: What agrees with the paper, from all rows.
        sides: Pairs of columns (lower bound, upper bound); a row in which the first is above the second is unsound.
        version: Raised whenever the same configuration gives other rows.
    """

    name: str
    paper: str
    statement: str
    minutes: tuple[float | int, float | int]
    parts: Callable[[Setting], Sequence[Part]]
    panels: Callable[[Sequence[Row]], Sequence[Panel]]
    verdicts: Callable[[Sequence[Row]], Sequence[Verdict]]
    sides: tuple[tuple[str, str], ...]
    version: int = 1


def finite(value: float) -> float | None:
    """The number, or None where it is not finite."""
    return value if math.isfinite(value) else None


def number(row: Row, column: str) -> float:
    """A number of a row; NaN where there is none."""
    value = row.get(column)
    return math.nan if value is None else float(value)


def column(rows: Sequence[Row], name: str, **where: Value) -> list[float]:
    """Numbers of a column in the rows whose other columns have the given values; rows without that number are left out.

    Examples:
        >>> column([{"n": 2, "kind": "a"}, {"n": 3, "kind": "b"}], "n", kind="b")
        [3.0]
    """
    found = (number(row, name) for row in rows if all(row.get(key) == value for key, value in where.items()))
    return [value for value in found if not math.isnan(value)]


def groups(rows: Sequence[Row], name: str) -> list[Value]:
    """The different values of a column, in the order in which they come."""
    return list(dict.fromkeys(row[name] for row in rows if row.get(name) is not None))
