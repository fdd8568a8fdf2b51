"""Ways to compute the rows of work items: in this process, or by processes that may die."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from attnrobust.errors import AttnRobustError
from attnrobust.results import Status
from attnrobust.runs.config import RunConfig
from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem

ATTEMPTS = 2
"""How often an item is given to a worker; one that ends its worker twice is an error row."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


WINDOW = 256
"""How far ahead an item of a certain input is looked for."""


class WorkerError(AttnRobustError):
    """Workers cannot start, so no row can be computed."""


def compute(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Rows of items by the engine of the configuration, as they are done; the values do not depend on the engine.

    Args:
        bench: The configuration's workbench; used for the rows themselves only by the engine in this process.
        items: What to compute.
        stop: Once set, no further item is begun; the ones at work are finished.
    """
    execution = bench.config.execution
    if execution.engine == "ray":
        from attnrobust.runs.engines.ray import compute_on_ray

        return compute_on_ray(bench, items, stop)
    if execution.workers == 0:
        return compute_here(bench, items, stop)
    return compute_in_pool(bench, items, stop)


def compute_here(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """One item after the other in this process."""
    with _torch_threads(bench.config.threads):
        for item in items:
            if stop.is_set():
                return
            yield bench.row(item)


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


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- processes -------------------------------------------------------------------------------------------------------


class _Worker:
    """One process with a model; it gets one item at a time."""

    def __init__(self, config: RunConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, config.model_dump_json()), daemon=True
        )
        with _environment(dict.fromkeys(THREAD_VARIABLES, str(config.threads))):
            self.process.start()
        theirs.close()
        self.ready = False
        self.item: WorkItem | None = None
        self.source: int | None = None
        self.deadline = float("inf")

    def give(self, item: WorkItem, timeout: float | None) -> None:
        self.item, self.source = item, item.source
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout
        with suppress(OSError):  # a worker that just died is noticed when it is listened to
            self.connection.send(item)

    def take(self) -> WorkItem:
        """The item at work; the worker is free afterwards."""
        assert self.item is not None  # noqa: S101 - only called for busy workers
        item, self.item, self.deadline = self.item, None, float("inf")
        return item

    def end(self, *, kill: bool = False) -> int | None:
        """End the process; its exit code."""
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _serve(connection: Connection, config: str) -> None:
    """Life of a worker: load the model once, then compute items until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parsed = RunConfig.model_validate_json(config)
    torch.set_num_threads(parsed.threads)
    bench = Workbench(parsed)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent ended; there is no one to work for
        try:
            _ = bench.model
        except AttnRobustError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            connection.send(bench.row(connection.recv()))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that a process started inside inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Pool:
    """The workers and what is still to do."""

    def __init__(self, bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> None:
        self.bench, self.stop = bench, stop
        self.todo = deque(items)
        self.attempts: Counter[str] = Counter()
        self.failed_starts = 0
        self.workers: list[_Worker] = []

    @property
    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.item is not None]

    def rows(self) -> Generator[Row, None, None]:
        wanted = min(self.bench.config.execution.workers, len(self.todo))
        try:
            while (self.todo and not self.stop.is_set()) or self.busy:
                while len(self.workers) < wanted and self.todo and not self.stop.is_set():
                    self.workers.append(_Worker(self.bench.config))
                self._feed()
                yield from self._collect()
        finally:
            for worker in self.workers:
                worker.end(kill=worker.item is not None)

    def _feed(self) -> None:
        for worker in self.workers:
            if worker.ready and worker.item is None and self.todo and not self.stop.is_set():
                others = {other.source for other in self.workers if other is not worker}
                worker.give(take_next(self.todo, worker.source, others), self.bench.config.execution.timeout)

    def _collect(self) -> Iterator[Row]:
        """Wait for the next thing to happen to any worker, at most until the next deadline."""
        patience = max(0.0, min([0.5, *(worker.deadline - time.monotonic() for worker in self.busy)]))
        events = wait([worker.connection for worker in self.workers], timeout=patience)
        for worker in list(self.workers):
            if worker.connection in events:
                yield from self._heard(worker)
            elif time.monotonic() > worker.deadline:
                item = worker.take()
                self._drop(worker, kill=True)
                seconds = self.bench.config.execution.timeout
                yield self.bench.failed(item, Status.TIMEOUT, f"took longer than {seconds:g} s")

    def _heard(self, worker: _Worker) -> Iterator[Row]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._died(worker)
            return
        if isinstance(message, Row):
            worker.take()
            self._feed()  # before the row is handed on: the worker does not wait while it is written
            yield message
        elif message is None:
            worker.ready, self.failed_starts = True, 0
        else:
            raise WorkerError(message)

    def _died(self, worker: _Worker) -> Iterator[Row]:
        item = worker.take() if worker.item is not None else None
        code = self._drop(worker)
        if item is None:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise WorkerError(f"worker processes end while they start ({_ending(code)}); try fewer workers")
            return
        self.attempts[item.row_id] += 1
        if self.attempts[item.row_id] < ATTEMPTS:
            self.todo.appendleft(item)
        else:
            yield self.bench.failed(item, Status.ERROR, f"its worker process ended {ATTEMPTS} times ({_ending(code)})")

    def _drop(self, worker: _Worker, *, kill: bool = False) -> int | None:
        self.workers.remove(worker)
        return worker.end(kill=kill)


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def compute_in_pool(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Items one by one on spawned processes, each with its own model.

    A worker that dies is replaced and its item tried once more; a row that exceeds the timeout ends its worker and has
    status timeout.

    Raises:
        WorkerError: Workers cannot start.
    """
    return _Pool(bench, items, stop).rows()
