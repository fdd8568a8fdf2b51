"""What this process computes at the moment, for those who wait: which input, which certificate or attack."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Listener = Callable[["Activity"], object]


@dataclass(frozen=True)
class Activity:
    """A part of a row.

    Args:
        input_id: The row's input.
        place: Its layer or depth.
        what: The certificate or attack.
        since: When it began, by ``time.monotonic``.
    """

    input_id: str
    place: str
    what: str
    since: float

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.since


_listeners: list[Listener] = []


def now(input_id: str, place: str, what: str) -> None:
    """Tell whoever listens what begins."""
    if _listeners:
        activity = Activity(input_id, place, what, time.monotonic())
        for listener in _listeners:
            listener(activity)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block the listener is told."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
