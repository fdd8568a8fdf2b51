"""Tables of results on narrow terminals: names get shorter, then columns go, the radii and the status stay."""

import re
from collections.abc import Callable

from rich.cells import cell_len
from rich.text import Text

from attnrobust.text import shortened

Cell = str | Text
Change = Callable[[str], str]
Step = tuple[str, Change | None]
"""A column's name and how its cells become shorter; None takes the column away."""

_OF_A_TEXT = re.compile(r"(\d{4,})-[0-9a-f]{8}")
"""The name of a text: the number of its line, and a digest."""
BETWEEN = " > "
"""Between the class that stays and the one of the attack."""


def length(cell: Cell) -> int:
    """Characters of a cell on one line."""
    return cell_len(cell if isinstance(cell, str) else cell.plain)


def longest_word(cell: Cell) -> int:
    """Characters of its longest word."""
    return max(map(cell_len, (cell if isinstance(cell, str) else cell.plain).split()), default=1)


def changed(cell: Cell, change: Change) -> Cell:
    """A cell after a step; what has colours stays as it is."""
    return change(cell) if isinstance(cell, str) else cell


def _at_most(longest: int) -> Change:
    return lambda cell: shortened(cell, longest)


def _classes_at_most(longest: int) -> Change:
    return lambda cell: BETWEEN.join(shortened(part, longest) for part in cell.split(BETWEEN))


STEPS: tuple[Step, ...] = (
    ("input", lambda cell: _OF_A_TEXT.sub(r"\1", cell)),
    ("text", _at_most(24)),
    ("class", _classes_at_most(10)),
    ("of |token|", None),
    ("s", None),
    ("text", _at_most(16)),
    ("share", None),
    ("by", _at_most(16)),
    ("n", None),
    ("text", None),
    ("margin", None),
    ("tolerance", None),
    ("class", _classes_at_most(7)),
    ("by", None),
    ("of |x|", None),
)
"""What gives way in the table of rows, in this order."""
