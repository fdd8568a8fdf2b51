"""Exit codes, and how errors become one line on stderr."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING

import typer

from attnrobust.cli.output import say
from attnrobust.errors import AttnRobustError, InputError, SoundnessError
from attnrobust.status import Status

if TYPE_CHECKING:
    from attnrobust.runs.rows import Row

_CLICK_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

MOST_MESSAGES = 20

log = logging.getLogger("attnrobust")


class ExitCode(IntEnum):
    """What the process says to its caller."""

    OK = 0
    BELOW = 1  # --fail-under: a radius is below the threshold
    USAGE = 2  # wrong usage or input, in words
    UNSOUND = 3  # a verified attack inside a certified radius
    INTERNAL = 70  # an error that this program did not foresee (EX_SOFTWARE)
    INTERRUPTED = 130  # Ctrl-C
    PIPE = 141  # the reader of stdout went away


def guarded(call: Callable[[], int | None]) -> int:
    """Run a command; foreseen errors are one line, others a traceback with their own exit code.

    Args:
        call: The command; its value is the exit code (None: 0).

    Returns:
        The exit code.
    """
    try:
        code = int(call() or ExitCode.OK)
        sys.stdout.flush()  # what is left in the buffer may meet a reader who went away
        return code
    except SoundnessError as error:
        say(str(error))
        return ExitCode.UNSOUND
    except AttnRobustError as error:
        log.debug("usage error", exc_info=True)
        say(" ".join(str(error).split()))
        return ExitCode.USAGE
    except _CLICK_ERROR as error:
        if message := _click_message(error):  # empty after the help that a bare command prints
            say(f"{message}; see {_command_path(error)} --help")
        return ExitCode.USAGE
    except KeyboardInterrupt:
        say("interrupted")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return _leave_pipe()
    except SystemExit as end:  # click and rich end the process with 1 where the reader of stdout went away
        if isinstance(end.__context__, BrokenPipeError):
            return _leave_pipe()
        raise
    except Exception:  # noqa: BLE001 - exit code 1 means "below the threshold", so a crash needs its own
        traceback.print_exc()
        say("this error was not foreseen; please report it with the lines above")
        return ExitCode.INTERNAL


def _leave_pipe() -> ExitCode:
    """Let what is still to be flushed go nowhere, so that the interpreter ends without a complaint."""
    with suppress(OSError, ValueError):  # ValueError: a stdout without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.PIPE


def _click_message(error: Exception) -> str:
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return " ".join(message.rstrip(".").split())


def _command_path(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "attnrobust"


def require_threshold(fail_under: float | None) -> None:
    """Refuse a threshold that no radius can be compared with."""
    if fail_under is not None and not fail_under >= 0:
        raise InputError(f"--fail-under must be a number >= 0; got {fail_under}")


def exit_code(rows: Sequence["Row"], *, fail_under: float | None = None) -> ExitCode:
    """The exit code of rows, each deviation told on stderr.

    UNSOUND comes first; then rows that all ended in an error; then a radius (certified if there is one, else of the
    attack) below ``fail_under``, where a row with an error counts as below.

    Args:
        rows: All rows of the run.
        fail_under: The threshold, or None.
    """
    _tell_messages(rows)
    if any(row.status == Status.UNSOUND for row in rows):
        return ExitCode.UNSOUND
    failed = [row for row in rows if row.status in (Status.ERROR, Status.DISAGREES)]
    if rows and len(failed) == len(rows):
        say("no input could be computed")
        return ExitCode.USAGE
    from attnrobust.runs.rows import scopes

    below = [row for row in rows if fail_under is not None and not _reaches(row, fail_under)]
    if below:
        about = "".join(f"; {scope}" for scope in scopes(below))
        say(f"{len(below)} of {len(rows)} rows are below --fail-under {fail_under:g}, first {below[0].input_id}{about}")
        return ExitCode.BELOW
    return ExitCode.OK


def _tell_messages(rows: Sequence["Row"]) -> None:
    """What went wrong, the unsound rows first; what several rows say is told once."""
    having: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.status != Status.UNSOUND):
        if row.message and (row.status != Status.MISCLASSIFIED or row.depth is not None):
            having.setdefault(row.message, []).append(row.input_id)
    for message, inputs in list(having.items())[:MOST_MESSAGES]:
        others = len(inputs) - 1
        more = f" and {others} more row{'s' if others > 1 else ''}" if others else ""
        say(f"{inputs[0]}{more}: {message}")
    if len(having) > MOST_MESSAGES:
        say(f"and {len(having) - MOST_MESSAGES} more messages; they are in the rows")


def _reaches(row: "Row", threshold: float) -> bool:
    if row.status in (Status.ERROR, Status.DISAGREES):
        return False
    if row.certified_radius is not None:
        return row.certified_radius >= threshold
    # An attack alone: no violation found means that nothing is known to be below.
    return row.attack_radius is None or row.attack_radius >= threshold
