"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from attnrobust.cli.output import printable
from attnrobust.text import shown


@runtime_checkable
class Progressing(Protocol):
    """What is shown of a row."""

    @property
    def input_id(self) -> str:
        """The input's name."""

    @property
    def n(self) -> int:
        """Its tokens."""

    @property
    def status(self) -> str:
        """How it ended."""

    @property
    def certified_radius(self) -> float | None:
        """Certified radius, if there is one."""

    @property
    def attack_radius(self) -> float | None:
        """Attack radius, if there is one."""


R = TypeVar("R", bound=Progressing)


def tracked(rows: Iterable[R], total: int, *, quiet: bool = False) -> Iterator[R]:
    """Pass rows on as they come, and show how far the run is.

    Args:
        rows: Rows, computed when they are asked for.
        total: How many will come.
        quiet: Show nothing.
    """
    if quiet:
        yield from rows
    elif sys.stderr.isatty():
        yield from _with_bar(rows, total)
    else:
        yield from _with_lines(rows, total)


def _with_bar(rows: Iterable[R], total: int) -> Iterator[R]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=total)
        for row in rows:
            yield row
            progress.advance(task)


def _with_lines(rows: Iterable[R], total: int) -> Iterator[R]:
    start = time.perf_counter()
    for number, row in enumerate(rows, start=1):
        parts = [f"[{number}/{total}] {printable(row.input_id)} n={row.n} {row.status}"]
        if row.certified_radius is not None:
            parts.append(f"certified {shown(row.certified_radius)}")
        if row.attack_radius is not None:
            parts.append(f"attack {shown(row.attack_radius)}")
        left = (time.perf_counter() - start) / number * (total - number)
        print(*parts, f"left {left:.0f} s", sep="  ", file=sys.stderr, flush=True)  # noqa: T201 - progress
        yield row
