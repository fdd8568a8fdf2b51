"""The one way in which a table is laid out for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        name: Its heading.
        right: Whether its cells end at the right, as numbers do.
        fold: Whether long cells take several lines; otherwise they stay on one.
        widest: Most characters of a line of it, or None.
    """

    name: str
    right: bool = False
    fold: bool = True
    widest: int | None = None


def words(*names: str) -> list[Column]:
    """Columns of words."""
    return [Column(name) for name in names]


def numbers(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, right=True) for name in names]


def lay_out(
    columns: Sequence[Column],
    lines: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    caption: str | None = None,
    sections: bool = False,
) -> Table:
    """A table in which no text is taken for markup, wherever it comes from.

    Args:
        columns: From left to right.
        lines: A cell for each column.
        title: Above the table.
        caption: Below it.
        sections: Draw a rule wherever the first cell changes.
    """
    table = Table(
        title=None if title is None else Text(title), title_justify="left",
        caption=None if caption is None else Text(caption), caption_justify="left",
    )  # fmt: skip
    for column in columns:
        table.add_column(
            Text(column.name), justify="right" if column.right else "left", overflow="fold", no_wrap=not column.fold,
            max_width=column.widest,
        )  # fmt: skip
    previous: str | None = None
    for line in lines:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in line]
        if sections and previous not in (None, cells[0].plain):
            table.add_section()
        previous = cells[0].plain if cells else None
        table.add_row(*cells)
    return table
