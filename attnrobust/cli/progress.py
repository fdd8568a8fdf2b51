"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from attnrobust.cli.output import printable
from attnrobust.text import shown_bound

if TYPE_CHECKING:
    from attnrobust.runs.activity import Activity

SILENCE = 10.0
"""Seconds without a row after which a line says what is computed."""


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
    def layer(self) -> str:
        """Its layer or depth."""

    @property
    def threat(self) -> str:
        """Its threat."""

    @property
    def goal(self) -> str:
        """Its goal."""

    @property
    def certified_radius(self) -> float | None:
        """Certified radius, if there is one."""

    @property
    def attack_radius(self) -> float | None:
        """Attack radius, if there is one."""


FIRST_ROWS = 4
"""Rows before which nothing is said of the time that is left."""

R = TypeVar("R", bound=Progressing)


def tracked(rows: Iterable[R], total: int, *, quiet: bool = False, places: bool = False) -> Iterator[R]:
    """Pass rows on as they come, and show how far the run is.

    Args:
        rows: Rows, computed when they are asked for.
        total: How many will come.
        quiet: Show nothing.
        places: Also show each row's layer, threat and goal.
    """
    if quiet:
        yield from rows
    else:
        from attnrobust.runs.activity import listening

        inside = _Inside()
        with listening(inside.hear):
            yield from (
                _with_bar(rows, total, inside)
                if sys.stderr.isatty()
                else _with_lines(rows, total, inside, places=places)
            )


class _Inside:
    """What was last heard of inside a row: the input, the certificate or attack, for how long."""

    def __init__(self) -> None:
        self._heard: Activity | None = None

    def hear(self, activity: "Activity") -> None:
        """Remember it."""
        self._heard = activity

    @property
    def line(self) -> str:
        """It in words; empty where nothing was heard, as from other processes."""
        heard = self._heard
        if heard is None:
            return ""
        return f"{printable(heard.input_id)}  {printable(heard.place)}  {heard.what}  {heard.seconds:.0f} s"


class _Pace:
    """How long the rest may take, from the rows since the first one, which has the loading in it."""

    def __init__(self, total: int) -> None:
        self._total, self._seen, self._since = total, 0, 0.0

    def row(self) -> None:
        """A row has come."""
        self._seen += 1
        if self._seen == 1:
            self._since = time.perf_counter()

    @property
    def line(self) -> str:
        """In words; empty where too few rows are known to tell, and at the end."""
        if self._seen < FIRST_ROWS or self._seen >= self._total:
            return ""
        seconds = (time.perf_counter() - self._since) / (self._seen - 1) * (self._total - self._seen)
        return f"about {in_words(seconds)} left at this pace"


def in_words(seconds: float) -> str:
    """A time as coarse as a guess of it is."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def _with_bar(rows: Iterable[R], total: int, inside: _Inside) -> Iterator[R]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    pace = _Pace(total)

    class Now(ProgressColumn):
        """What is left, and what is computed inside the row."""

        def render(self, task: Task) -> Text:
            """The words."""
            return Text("  ".join(filter(None, (pace.line, inside.line))))

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), Now(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=total)
        for row in rows:
            yield row
            pace.row()
            progress.advance(task)


def _with_lines(rows: Iterable[R], total: int, inside: _Inside, *, places: bool) -> Iterator[R]:
    _line(f"[0/{total}] begins")
    with _Silence(inside) as told:
        yield from _lines(rows, total, told, places=places)


class _Silence:
    """A thread that says what is computed after every ``SILENCE`` seconds without a row."""

    def __init__(self, inside: _Inside) -> None:
        self._inside, self._row, self._ended = inside, threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Silence":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._row.set()
        self._thread.join()

    def broken(self) -> None:
        """A row has come."""
        self._row.set()

    def _watch(self) -> None:
        while not self._ended:
            if not self._row.wait(SILENCE):
                _line(f"  still at work  {self._inside.line}".rstrip())
            self._row.clear()


def _line(*parts: str) -> None:
    print(*parts, sep="  ", file=sys.stderr, flush=True)  # noqa: T201 - progress


def _lines(rows: Iterable[R], total: int, silence: _Silence, *, places: bool) -> Iterator[R]:
    pace = _Pace(total)
    for number, row in enumerate(rows, start=1):
        silence.broken()
        pace.row()
        where = f"  {', '.join(map(printable, (row.layer, row.threat, row.goal)))} " if places else ""
        status = str(row.status).replace("_", " ")
        parts = [f"[{number}/{total}] {printable(row.input_id)} n={row.n}{where} {status}"]
        if row.certified_radius:  # 0 also stands for a row that no certificate speaks about
            parts.append(f"certified {shown_bound(row.certified_radius, up=False)}")
        if row.attack_radius is not None:
            parts.append(f"attack {shown_bound(row.attack_radius, up=True)}")
        _line(*filter(None, (*parts, pace.line)))
        yield row
