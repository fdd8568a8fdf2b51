"""The one way in which a table is laid out for the terminal: as columns where they fit, else as one block a line."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from attnrobust.reports.narrow import Cell, Step, changed, length, longest_word


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        name: Its heading.
        right: Whether its cells end at the right, as numbers do.
        fold: Whether long cells may take several lines, between words; otherwise they stay on one.
        widest: Most characters of a line of it, or None.
        shared: Whether a value that all lines share may go below the table where the terminal is narrow.
    """

    name: str
    right: bool = False
    fold: bool = True
    widest: int | None = None
    shared: bool = False


def words(*names: str) -> list[Column]:
    """Columns of words."""
    return [Column(name) for name in names]


def numbers(*names: str) -> list[Column]:
    """Columns of numbers, which are never broken."""
    return [Column(name, right=True, fold=False) for name in names]


def lay_out(
    columns: Sequence[Column],
    lines: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    caption: str | None = None,
    sections: bool = False,
    new_section: Sequence[bool] = (),
    steps: Sequence[Step] = (),
) -> "FittingTable":
    """A table in which no text is taken for markup, wherever it comes from, and which fits the terminal it is shown on.

    Args:
        columns: From left to right.
        lines: A cell for each column.
        title: Above the table.
        caption: Below it.
        sections: Draw a rule wherever the first cell changes.
        new_section: Of each line whether a rule is above it, in place of ``sections``.
        steps: What gives way first on a narrow terminal (``attnrobust.reports.narrow``).
    """
    cells = tuple(tuple(line) for line in lines)
    firsts = [_plain(line[0]) for line in cells] if sections else []
    rules = tuple(new_section) or tuple(i > 0 and first != firsts[i - 1] for i, first in enumerate(firsts))
    return FittingTable(_Content(tuple(columns), cells, caption), title, rules, steps)


@dataclass(frozen=True)
class _Content:
    """Columns and cells, and what is told below them."""

    columns: tuple[Column, ...]
    lines: tuple[tuple[Cell, ...], ...]
    caption: str | None

    def cells(self, place: int) -> list[Cell]:
        """One column's cells."""
        return [line[place] for line in self.lines]

    def natural(self) -> list[int]:
        """Characters of each column if nothing is broken."""
        return [
            min(max(map(length, [column.name, *self.cells(i)])), column.widest or 10**9)
            for i, column in enumerate(self.columns)
        ]

    def least(self) -> list[int]:
        """Characters of each column if it is broken wherever it may be: between words, numbers nowhere."""
        found = []
        for i, column in enumerate(self.columns):
            size = longest_word if column.fold else length
            needed = max([longest_word(column.name), *map(size, self.cells(i))])
            found.append(min(needed, column.widest or needed))
        return found

    def changed(self, step: Step) -> "_Content":
        """After one step: a column's cells are shorter, or the column is gone."""
        name, change = step
        places = [i for i, column in enumerate(self.columns) if column.name == name]
        if change is None:
            return self.without(places)
        lines = (
            tuple(changed(cell, change) if i in places else cell for i, cell in enumerate(line)) for line in self.lines
        )
        return replace(self, lines=tuple(lines))

    def without(self, places: Sequence[int]) -> "_Content":
        """Without some columns."""
        kept = [i for i in range(len(self.columns)) if i not in places]
        lines = tuple(tuple(line[i] for i in kept) for line in self.lines)
        return replace(self, columns=tuple(self.columns[i] for i in kept), lines=lines)

    def shared_below(self) -> "_Content":
        """What all lines share is told once, below the table."""
        places = [i for i, column in enumerate(self.columns) if column.shared and self._same(i)]
        told = [f"{self.columns[i].name}: {_plain(self.lines[0][i])}" for i in places]
        if not told:
            return self
        caption = "; ".join(part for part in ("in every line " + ", ".join(told), self.caption) if part)
        return replace(self.without(places), caption=caption)

    def _same(self, place: int) -> bool:
        return len({_plain(cell) for cell in self.cells(place)}) == 1


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.plain


class FittingTable(Table):
    """A table that asks for its width when it is shown. No number loses a digit and no name is cut in its middle.

    Args:
        content: Columns and lines.
        title: Above it.
        rules: Of each line whether a rule is above it; empty draws none.
        steps: What gives way first.
    """

    def __init__(self, content: _Content, title: str | None, rules: Sequence[bool], steps: Sequence[Step]) -> None:
        super().__init__()
        self._content, self._heading, self._rules, self._steps = content, title, rules, steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Title, table and caption for the width at hand."""
        content, sizes = self._fitted(options.max_width)
        if self._heading is not None:
            yield Text(self._heading, style="italic")
        if sizes is None:
            yield from stacked(content.columns, content.lines, options.max_width)
        else:
            yield from self._drawn(content, sizes).__rich_console__(console, options)
        if content.caption is not None:
            yield Text(content.caption, style="dim italic")

    def _fitted(self, width: int) -> tuple[_Content, list[int] | None]:
        """What is shown, and how wide each column is; None where columns do not fit."""
        content = self._content
        for step in self._steps:
            if sum(content.natural()) <= _room(content, width):
                break
            content = content.changed(step)
        sizes = shrunk(content.natural(), content.least(), _room(content, width))
        if sizes is None:
            content = content.shared_below()
            sizes = shrunk(content.natural(), content.least(), _room(content, width))
        return content, sizes

    def _drawn(self, content: _Content, sizes: Sequence[int]) -> Table:
        table = Table()
        for column, size in zip(content.columns, sizes, strict=True):
            justify: Literal["right", "left"] = "right" if column.right else "left"
            table.add_column(Text(column.name), justify=justify, overflow="fold", width=size)
        for line, rule in zip(content.lines, self._rules or repeat(False), strict=False):
            if rule:
                table.add_section()
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in line))
        return table


def _room(content: _Content, width: int) -> int:
    """Characters for the cells: each column has three more, and the table one."""
    return width - 3 * len(content.columns) - 1


def shrunk(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Widths that fit: the widest column that may give way does so, character by character.

    Args:
        natural: Widths if nothing is broken.
        least: Widths below which something is broken that must not be.
        room: Most characters of all together.

    Returns:
        The widths; None if there are none.
    """
    sizes = list(natural)
    for _ in range(sum(sizes) - room):
        slack = [i for i, size in enumerate(sizes) if size > least[i]]
        if not slack:
            return None
        sizes[max(slack, key=lambda i: sizes[i])] -= 1
    return sizes


def stacked(columns: Sequence[Column], lines: Sequence[Sequence[Cell]], width: int) -> Iterable[Text]:
    """One block a line: its first cell, and below it names and values, each pair unbroken where it fits."""
    for line in lines:
        yield Text(_plain(line[0]), style="bold")
        row = Text("  ")
        for column, cell in list(zip(columns, line, strict=True))[1:]:
            pair = Text.assemble((f"{column.name}: ", "dim"), cell)
            if len(row) > 2 and row.cell_len + pair.cell_len + 3 > width:
                yield row
                row = Text("  ")
            row.append_text(Text("   " if len(row) > 2 else "")).append_text(pair)
        yield row
