"""Rows of work items on worker processes of this machine, each with its own model."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import ClassVar

import torch

from attnrobust.errors import AttnRobustError
from attnrobust.runs.config import RunConfig
from attnrobust.runs.engines.schedule import THREAD_VARIABLES, Ended, Event, Ready, Refused, Schedule
from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem


def compute_in_pool(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Items one by one on spawned processes, each with its own model; see ``Schedule``.

    Raises:
        WorkerError: Workers cannot start.
    """
    return Schedule(Processes(bench.config), bench, items, stop).rows()


class ProcessWorker:
    """One process with a model.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, config.model_dump_json()), daemon=True
        )
        with _environment(dict.fromkeys(THREAD_VARIABLES, str(config.threads))):
            self.process.start()
        theirs.close()

    def give(self, item: WorkItem) -> None:
        """Send an item."""
        with suppress(OSError):  # a worker that just died is noticed when it is listened to
            self.connection.send(item)

    def receive(self) -> Event:
        """What it sent."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return Ended(self.death())
        if message is None:
            return Ready()
        return message if isinstance(message, Row) else Refused(message)

    def death(self) -> str:
        """How the process ended, once its connection is closed."""
        self.process.join(timeout=10)
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def end(self, *, kill: bool) -> None:
        """Close the connection, upon which the process ends by itself, or end it at once."""
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Processes:
    """The worker processes of a configuration.

    Args:
        config: The run's configuration.
    """

    noun = "worker process"
    cure = "try fewer workers"
    worker: ClassVar[type[ProcessWorker]] = ProcessWorker

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def start(self) -> ProcessWorker:
        return self.worker(self._config)

    def wait(self, workers: Sequence[ProcessWorker], *, seconds: float) -> list[tuple[ProcessWorker, Event]]:
        ready = wait([worker.connection for worker in workers], timeout=seconds)
        return [(worker, worker.receive()) for worker in workers if worker.connection in ready]


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
