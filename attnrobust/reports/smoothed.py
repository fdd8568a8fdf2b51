"""The table of smoothed decisions for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from attnrobust.reports.layout import Column, lay_out
from attnrobust.reports.tables import percent
from attnrobust.runs.smoothed import SmoothedRow
from attnrobust.text import shortened, shown

CAPTION = (
    "Both radii are of the smoothed decision, which is another model; they say nothing about the model without noise."
)


def smoothed_table(rows: Sequence[SmoothedRow], *, title: str) -> Table:
    """One line per input: the decisions, the share of votes, both radii, the gap.

    Args:
        rows: The rows, all of one command.
        title: Above the table.
    """
    columns = [
        Column("input", widest=28), Column("n", right=True), Column("class", widest=20),
        *(Column(name, right=True, fold=False) for name in ("votes", "certified", "attack", "gap")),
        Column("status", widest=32),
    ]  # fmt: skip
    return lay_out(columns, [_cells(row) for row in rows], title=title, caption=CAPTION)


def _cells(row: SmoothedRow) -> list[str]:
    answer = row.answer
    gap = None if answer is None or row.attack_radius is None else answer.gap
    return [
        row.input_id, str(row.n), _classes(row), percent(None if answer is None else answer.share),
        shown(row.certified_radius), shown(row.attack_radius), shown(gap, 3), row.message or row.status,
    ]  # fmt: skip


def _classes(row: SmoothedRow) -> str:
    """The smoothed decision, after the model's own where they differ."""
    label, majority = shortened(row.label or "-", 20), shortened(row.majority or "?", 20)
    return label if row.majority in (row.label, None) else f"{label} > {majority}"
