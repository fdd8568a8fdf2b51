"""Ctrl-C in two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from attnrobust.cli.output import say


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) sets the event, so that running rows finish; the second ends at once."""
    stop = threading.Event()

    def asked(_: int, __: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("finishing the running rows; interrupt again to end at once")

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
