"""Certified accuracy: which share of the inputs is certified, broken or undecided at each size of a change."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from attnrobust.errors import InputError
from attnrobust.reports.layout import Column, lay_out, numbers
from attnrobust.runs.rows import Row, scopes
from attnrobust.status import Status
from attnrobust.text import exactly

POINTS = 9
"""Sizes of the table where none are given."""


@dataclass(frozen=True)
class CurvePoint:
    """Shares of the inputs at one size; they sum to 1.

    Args:
        epsilon: Size of the change, in the threat's distance.
        certified: Share whose certified radius is at least epsilon: a lower bound of the robust share.
        broken: Share with a verified violation of size at most epsilon; 1 - broken is an upper bound of it.
        undecided: The others, also those without any result.
    """

    epsilon: float
    certified: float
    broken: float
    undecided: float


@dataclass(frozen=True)
class Curve:
    """The curve of one layer or depth, threat and goal.

    Args:
        layer: The layer's name or depth.
        threat: The threat's key.
        goal: The goal's key.
        inputs: How many inputs there are.
        points: By size.
    """

    layer: str
    threat: str
    goal: str
    inputs: int
    points: tuple[CurvePoint, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def curves(rows: Sequence[Row], *, epsilons: Sequence[float] | None = None) -> list[Curve]:
    """One curve for each layer or depth, threat and goal; nothing is pooled over them.

    An input whose goal fails without any move is broken at every size; one that ended in an error is undecided.

    Args:
        rows: Any rows.
        epsilons: Sizes; None takes ``POINTS`` around the radii of each group, and 0.

    Raises:
        InputError: A size that is not a number >= 0.
    """
    if epsilons is not None and not all(0.0 <= e < math.inf for e in epsilons):
        raise InputError("every epsilon must be a number >= 0")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.threat, row.goal), []).append(row)
    return [
        Curve(*key, len(group), tuple(_point(group, e) for e in (epsilons or sizes(group))))
        for key, group in groups.items()
    ]


def sizes(rows: Sequence[Row]) -> list[float]:
    """0 and sizes in equal steps of the logarithm from the smallest radius to the largest; of two digits."""
    radii = [r for row in rows for r in (row.certified_radius, row.attack_radius) if r is not None and r > 0]
    if not radii:
        return [0.0]
    low, high = math.log(min(radii)), math.log(max(radii))
    inner = [math.exp(low + (high - low) * i / (POINTS - 2)) for i in range(POINTS - 1)]
    return [0.0, *dict.fromkeys(float(f"{size:.2g}") for size in inner)]


def _point(rows: Sequence[Row], epsilon: float) -> CurvePoint:
    broken = sum(_breaks(row, epsilon) for row in rows)
    certified = sum(_holds(row, epsilon) and not _breaks(row, epsilon) for row in rows)
    total = len(rows)
    return CurvePoint(epsilon, certified / total, broken / total, (total - certified - broken) / total)


def _holds(row: Row, epsilon: float) -> bool:
    """Certified at this size; what is true of the clean input is certified at 0."""
    if row.status in (Status.ERROR, Status.MISCLASSIFIED, Status.UNSOUND):
        return False
    return row.certified_radius is not None and row.certified_radius >= epsilon


def _breaks(row: Row, epsilon: float) -> bool:
    if row.status == Status.MISCLASSIFIED:
        return True
    return row.attack_radius is not None and row.attack_radius <= epsilon


def curve_table(curve: Curve, *, scope: str | None = None) -> Table:
    """The curve for the terminal."""
    lines = [
        (exactly(p.epsilon), *(f"{value:.1%}" for value in (p.certified, p.undecided, p.broken))) for p in curve.points
    ]
    title = f"{curve.layer}, {curve.threat}, {curve.goal}: {curve.inputs} inputs"
    columns = [Column("epsilon", right=True, fold=False), *numbers("certified", "undecided", "broken")]
    return lay_out(columns, lines, title=title, caption=scope)


def scope_of(rows: Sequence[Row], curve: Curve) -> str | None:
    """What the goal of a curve is about."""
    return "; ".join(scopes([r for r in rows if (r.layer, r.goal) == (curve.layer, curve.goal)])) or None
