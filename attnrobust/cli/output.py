"""Stdout and stderr of the commands: tables, JSON, one-line messages."""

import os
import shlex
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_FILES = 200
"""Columns of tables that go to a file or a pipe, where nothing says how wide it is."""


GIVEN: ContextVar[tuple[str, ...]] = ContextVar("GIVEN", default=())
"""The words of the command that runs, as they were typed."""


def typed() -> str | None:
    """The command as it was typed, quoted for a shell; None outside of the command line."""
    return shlex.join(("attnrobust", *GIVEN.get())) if GIVEN.get() else None


def say(message: str) -> None:
    """One line on stderr."""
    import typer

    typer.echo(f"attnrobust: {printable(message)}", err=True)


def printable(text: str) -> str:
    """The text in one line; what a terminal would obey (controls, line ends, directions) is shown by its escape."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def place(path: Path) -> str:
    """A path for people: without ``..``, and from here on where it lies below."""
    clean, here = path.resolve(), Path.cwd().resolve()
    return str(clean.relative_to(here)) if clean.is_relative_to(here) else str(clean)


def console() -> "Console":
    """Stdout; a file or a pipe is as wide as COLUMNS says, or 200. What users wrote is never taken for markup."""
    from rich.console import Console

    told = os.environ.get("COLUMNS", "").isdecimal()
    width = None if sys.stdout.isatty() or told else WIDTH_OF_FILES
    return Console(width=width, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout, at once; escaped where stdout cannot hold a character."""
    from attnrobust.runs.storage.files import json_text

    text = json_text(value)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json_text(value, ascii_only=True)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_without_failing() -> None:
    """From now on a character that stdout or stderr cannot hold is printed as a question mark, and nothing is lost."""
    for stream in (sys.stdout, sys.stderr):
        _replace_characters(stream)


def _replace_characters(stream: TextIO) -> None:
    reconfigure = getattr(stream, "reconfigure", None)  # other programs may put their own object there
    if reconfigure is not None:
        reconfigure(errors="replace")
