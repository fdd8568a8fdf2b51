"""The exception tree: every error says what is wrong and how to cure it."""

import difflib
from collections.abc import Iterable

from attnrobust.meanings import meant


class AttnRobustError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(AttnRobustError, ValueError):
    """A value that the user gave cannot be used; the message names the cure."""


class UnsupportedModelError(InputError):
    """A module, mask or option that is not modelled exactly; nothing is approximated."""


class UnsupportedThreatError(InputError):
    """A method was asked for a threat or goal that it does not handle exactly."""


class UnknownNameError(InputError):
    """A name that does not exist; the message lists the nearest ones.

    Args:
        kind: What was looked up ("layer", "threat", ...).
        name: The name that was not found.
        known: Every valid name.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known, shown = sorted(known), one_line(name)
        name = name if isinstance(name, str) else shown
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:10]
        meaning = meant(kind, name)
        if meaning in known:
            near = [meaning, *(other for other in near if other != meaning)]
        hint = ", ".join(near) if near else "none exist"
        question = f"did you mean {meaning}? " if meaning in known else ""
        super().__init__(f"unknown {kind} {shown}; {question}nearest: {hint}")
        self.kind, self.name, self.nearest = kind, name, tuple(near)


class AlreadyViolatedError(InputError):
    """The goal fails at the clean input itself, so no radius exists (it is 0)."""


class SoundnessError(AttnRobustError):
    """A verified attack lies inside a certified radius: one of the two is wrong."""


def one_line(value: object, longest: int = 100) -> str:
    """What a user gave, as a message shows it: its ``repr`` in one line, cut where it is long."""
    try:
        shown = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a broken repr must not hide the error that quotes it
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error of another library (its class if it says nothing), to quote in a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
