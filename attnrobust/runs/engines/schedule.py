"""The queue in front of workers that may fail: who gets what, what is tried again, what has taken too long."""

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from attnrobust.errors import AttnRobustError
from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem
from attnrobust.status import Status

ATTEMPTS = 2
"""How often an item is given to a worker; one that ends its worker twice is an error row."""

WINDOW = 256
"""How far ahead an item of a certain input is looked for."""

POLL = 0.5
"""Seconds after which a stop is noticed while nothing else happens."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(AttnRobustError):
    """Workers cannot start, so no row can be computed."""


@dataclass(frozen=True)
class Ready:
    """The worker has loaded the model."""


@dataclass(frozen=True)
class Refused:
    """The worker cannot load the model, nor will another."""

    message: str


@dataclass(frozen=True)
class Ended:
    """The worker is gone."""

    cause: str


Event = Ready | Refused | Ended | Row


@runtime_checkable
class Worker(Protocol):
    """A process somewhere that has a model and computes one item at a time."""

    def give(self, item: WorkItem) -> None:
        """Let it compute an item; a worker that just ended is noticed by ``Engine.wait``."""

    def end(self, *, kill: bool) -> None:
        """End it; ``kill`` does not wait for the item at work."""


W = TypeVar("W", bound=Worker)


@runtime_checkable
class Engine(Protocol[W]):
    """Where workers come from.

    Args:
        noun: What a worker is called in messages.
        cure: What helps where none can start; empty if nothing is known to.
    """

    noun: str
    cure: str

    def start(self) -> W:
        """Begin a worker; ``wait`` tells when it is ready."""

    def wait(self, workers: Sequence[W], *, seconds: float) -> list[tuple[W, Event]]:
        """What happened to the workers; returns after so many seconds where nothing does."""


@dataclass(eq=False)
class _Place(Generic[W]):
    """What the schedule knows of one worker."""

    worker: W
    ready: bool = False
    item: WorkItem | None = None
    source: int | None = None  # the input that it had last
    deadline: float = float("inf")

    def begin(self, item: WorkItem, timeout: float | None) -> None:
        self.item, self.source = item, item.source
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self.worker.give(item)

    def release(self) -> WorkItem:
        """The item at work; the worker is free afterwards."""
        assert self.item is not None  # noqa: S101 - only called for busy workers
        item, self.item, self.deadline = self.item, None, float("inf")
        return item


class Schedule(Generic[W]):
    """The workers and what is still to do.

    A worker that ends is replaced and its item tried once more; a row that exceeds the timeout ends its worker and has
    status timeout.

    Args:
        engine: Where workers come from.
        bench: The configuration's workbench, for the rows of items that fail.
        items: What to compute.
        stop: Once set, no further item is begun.
    """

    def __init__(self, engine: Engine[W], bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> None:
        self._engine, self._bench, self._stop = engine, bench, stop
        self._todo = deque(items)
        self._wanted = min(max(1, bench.config.execution.workers), len(items))
        self._timeout = bench.config.execution.timeout
        self._attempts: Counter[str] = Counter()
        self._failed_starts = 0
        self._places: list[_Place[W]] = []

    def rows(self) -> Generator[Row, None, None]:
        """The rows as they are done; ends every worker, however it is left.

        Raises:
            WorkerError: Workers cannot load the model, or end while they start.
        """
        try:
            while self._open or self._busy:
                while self._open and len(self._places) < self._wanted:
                    self._places.append(_Place(self._engine.start()))
                self._give_work()
                yield from self._next()
        finally:
            for place in self._places:
                place.worker.end(kill=place.item is not None)

    @property
    def _open(self) -> bool:
        """Whether another item may be begun."""
        return bool(self._todo) and not self._stop.is_set()

    @property
    def _busy(self) -> list[_Place[W]]:
        return [place for place in self._places if place.item is not None]

    def _give_work(self) -> None:
        for place in self._places:
            if place.ready and place.item is None and self._open:
                others = {other.source for other in self._places if other is not place}
                place.begin(take_next(self._todo, place.source, others), self._timeout)

    def _next(self) -> Iterator[Row]:
        """Rows of the next thing that happens to any worker, at the latest at the next deadline."""
        patience = max(0.0, min([POLL, *(place.deadline - time.monotonic() for place in self._busy)]))
        places = {id(place.worker): place for place in self._places}
        events = self._engine.wait([place.worker for place in self._places], seconds=patience)
        heard = {id(worker) for worker, _ in events}
        now = time.monotonic()  # whoever takes the rows may be slow, which is no worker's fault
        late = [place for place in self._busy if now > place.deadline and id(place.worker) not in heard]
        for worker, event in events:
            yield from self._take(places[id(worker)], event)
        for place in late:
            item = place.release()
            self._drop(place, kill=True)
            yield self._bench.failed(item, Status.TIMEOUT, f"took longer than {self._timeout:g} s")

    def _take(self, place: _Place[W], event: Event) -> Iterator[Row]:
        match event:
            case Row():
                place.release()
                self._give_work()  # before the row is handed on: the worker does not wait while it is written
                yield event
            case Ready():
                place.ready, self._failed_starts = True, 0
            case Refused():
                raise WorkerError(event.message)
            case Ended():
                yield from self._replace(place, event.cause)

    def _replace(self, place: _Place[W], cause: str) -> Iterator[Row]:
        item = place.release() if place.item is not None else None
        self._drop(place, kill=False)
        if item is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                message = f"{self._engine.noun}s end while they start ({cause})"
                raise WorkerError("; ".join(part for part in (message, self._engine.cure) if part))
            return
        self._attempts[item.row_id] += 1
        if self._attempts[item.row_id] < ATTEMPTS:
            self._todo.appendleft(item)
        else:
            message = f"its {self._engine.noun} ended {ATTEMPTS} times ({cause})"
            yield self._bench.failed(item, Status.ERROR, message)

    def _drop(self, place: _Place[W], *, kill: bool) -> None:
        self._places.remove(place)
        place.worker.end(kill=kill)


def take_next(todo: deque[WorkItem], last: int | None, others: Collection[int | None]) -> WorkItem:
    """Take a worker's next item out of the list: the forward pass that captures an input's tokens is made once.

    Args:
        todo: What is to do; not empty.
        last: The input that this worker had before; it has the tokens of all layers at hand.
        others: Inputs that other workers have; they are taken only if nothing else is left.
    """
    ahead = range(min(len(todo), WINDOW))
    place = next((i for i in ahead if todo[i].source == last), None)
    if place is None:
        place = next((i for i in ahead if todo[i].source not in others), 0)
    item = todo[place]
    del todo[place]
    return item
