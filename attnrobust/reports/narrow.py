"""Tables of results on narrow terminals: names get shorter, then columns go, the radii and the status stay."""

import re
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.text import Text

from attnrobust.reports.layout import Column
from attnrobust.text import shortened

Cell = str | Text
Change = Callable[[str], str]

_OF_A_TEXT = re.compile(r"(\d{4,})-[0-9a-f]{8}")
"""The name of a text: the number of its line, and a digest."""
BETWEEN = " > "
"""Between the class that stays and the one of the attack."""


def fitted(
    columns: Sequence[Column], lines: Sequence[Sequence[Cell]], *, width: int | None
) -> tuple[list[Column], list[list[Cell]]]:
    """Columns and cells that fit into a width, as far as the steps go.

    Args:
        columns: All columns.
        lines: A cell for each of them.
        width: Characters of the terminal; None leaves everything as it is.
    """
    table = [list(column) for column in zip(*lines, strict=True)] if lines else [[] for _ in columns]
    kept = list(zip(columns, table, strict=True))
    for name, change in STEPS:
        if width is None or _natural_width(kept) <= width:
            break
        kept = [(column, _changed(cells, change) if column.name == name else cells) for column, cells in kept]
        kept = [(column, cells) for column, cells in kept if change is not None or column.name != name]
    rows = [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]
    return [column for column, _ in kept], rows if lines else []


def _natural_width(table: Sequence[tuple[Column, Sequence[Cell]]]) -> int:
    """Characters of a table whose cells stay on one line."""
    inner = (max(map(_length, [column.name, *cells])) for column, cells in table)
    return sum(size + 3 for size in inner) + 1


def _length(cell: Cell) -> int:
    return cell_len(cell if isinstance(cell, str) else cell.plain)


def _changed(cells: Sequence[Cell], change: Change | None) -> list[Cell]:
    if change is None:
        return list(cells)
    return [change(cell) if isinstance(cell, str) else cell for cell in cells]


def _at_most(longest: int) -> Change:
    return lambda cell: shortened(cell, longest)


def _classes_at_most(longest: int) -> Change:
    return lambda cell: BETWEEN.join(shortened(part, longest) for part in cell.split(BETWEEN))


STEPS: tuple[tuple[str, Change | None], ...] = (
    ("input", lambda cell: _OF_A_TEXT.sub(r"\1", cell)),
    ("text", _at_most(24)),
    ("class", _classes_at_most(10)),
    ("s", None),
    ("text", _at_most(16)),
    ("by", _at_most(16)),
    ("n", None),
    ("text", None),
    ("margin", None),
    ("tolerance", None),
    ("class", _classes_at_most(7)),
    ("by", None),
    ("of |x|", None),
)
"""What gives way, in this order: a column becomes shorter, or goes (None)."""
