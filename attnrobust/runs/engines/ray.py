"""Rows of work items on a Ray cluster; the only file that imports ray."""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnrobust.errors import AttnRobustError, InputError
from attnrobust.results import Status
from attnrobust.runs.config import RunConfig
from attnrobust.runs.engines.processes import ATTEMPTS, THREAD_VARIABLES, WorkerError, take_next
from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem

LOCAL = "local"
"""The address that starts a cluster on this machine."""

OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a cluster that is started here; rows are kilobytes."""

PATIENCE = 30.0
"""Seconds until a cluster that has no room for any actor is told."""

log = logging.getLogger(__name__)


class _Actor:
    """A worker somewhere in the cluster; loads the model once."""

    def __init__(self, config: str) -> None:
        self._bench = Workbench(RunConfig.model_validate_json(config))

    def load(self) -> str | None:
        """Load the model; what is wrong with it, or None."""
        torch.set_num_threads(self._bench.config.threads)
        try:
            _ = self._bench.model
        except AttnRobustError as error:
            return str(error)
        return None

    def row(self, item: WorkItem) -> Row:
        return self._bench.row(item)


def compute_on_ray(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Items one by one on Ray actors, each with its own model.

    An actor that dies is replaced and its item tried once more; a row that exceeds the timeout ends its actor and has
    status timeout. Joins the cluster that ``RAY_ADDRESS`` names, else starts one on this machine with as many CPUs as
    the actors take. Model and input files must be readable under the same paths on every node. Actors that the cluster
    has no room for wait; the others do the work.

    Args:
        bench: The configuration's workbench.
        items: What to compute.
        stop: Once set, no further item is begun.

    Raises:
        InputError: Ray is not installed.
        WorkerError: The actors cannot load the model, or end while they start.
    """
    if not items:
        return
    try:
        import ray
    except ImportError as error:
        raise InputError("engine ray needs Ray; pip install 'attnrobust[ray]'") from error
    started = not ray.is_initialized()
    if started:
        _connect(ray, bench.config)
    try:
        yield from _Cluster(ray, bench, items, stop).rows()
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, config: RunConfig) -> None:
    address = os.environ.get("RAY_ADDRESS", LOCAL)
    if address != LOCAL:
        ray.init(address=address, log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster tells nobody that it exists
    cpus = max(os.cpu_count() or 1, max(1, config.execution.workers) * config.threads)
    ray.init(
        address=LOCAL, num_cpus=cpus, object_store_memory=OBJECT_STORE, include_dashboard=False, log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip


@dataclass(frozen=True)
class _Job:
    actor: Any
    item: WorkItem
    deadline: float


class _Cluster:
    """The actors and what is still to do."""

    def __init__(self, ray: Any, bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> None:
        self.ray, self.bench, self.stop = ray, bench, stop
        self.todo = deque(items)
        self.attempts: Counter[str] = Counter()
        self.failed_starts = 0
        self.starting: dict[Any, Any] = {}  # reference to what load() gives, to its actor
        self.running: dict[Any, _Job] = {}  # reference to the row
        self.idle: list[Any] = []
        self.sources: dict[Any, int] = {}  # actor to the input that it had last
        self.complain_at = time.monotonic() + PATIENCE
        execution, threads = bench.config.execution, bench.config.threads
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        self.wanted = min(max(1, execution.workers), len(self.todo))
        self.actor_class = ray.remote(
            num_cpus=threads, num_gpus=execution.num_gpus, runtime_env={"env_vars": variables}
        )(_Actor)

    def rows(self) -> Generator[Row, None, None]:
        try:
            while (self.todo and not self.stop.is_set()) or self.running:
                self._feed()
                references = [*self.starting, *self.running]
                for reference in self.ray.wait(references, num_returns=1, timeout=self._patience())[0]:
                    if reference in self.starting:
                        self._started(reference)
                    else:
                        yield from self._finished(reference)
                yield from self._overdue()
                self._complain()
        finally:
            for actor in [*self.starting.values(), *self.idle, *(job.actor for job in self.running.values())]:
                self.ray.kill(actor)

    def _feed(self) -> None:
        """Start the actors that are missing, and give the idle ones work."""
        if self.stop.is_set():
            return
        while self.todo and len(self.starting) + len(self.idle) + len(self.running) < self.wanted:
            actor = self.actor_class.remote(self.bench.config.model_dump_json())
            self.starting[actor.load.remote()] = actor
        while self.todo and self.idle:
            actor = self.idle.pop()
            others = {source for other, source in self.sources.items() if other is not actor}
            item = take_next(self.todo, self.sources.get(actor), others)
            self.sources[actor] = item.source
            timeout = self.bench.config.execution.timeout
            deadline = float("inf") if timeout is None else time.monotonic() + timeout
            self.running[actor.row.remote(item)] = _Job(actor, item, deadline)

    def _patience(self) -> float:
        return max(0.0, min([0.5, *(job.deadline - time.monotonic() for job in self.running.values())]))

    def _started(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            wrong = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise WorkerError(f"Ray actors end while they start: {_cause(error)}") from error
            return
        if wrong is not None:
            raise WorkerError(wrong)
        self.failed_starts = 0
        self.idle.append(actor)

    def _finished(self, reference: Any) -> Iterator[Row]:
        job = self.running.pop(reference)
        try:
            row = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._end(job.actor)
            yield from self._lost(job.item, error)
        else:
            self.idle.append(job.actor)
            yield row

    def _end(self, actor: Any) -> None:
        self.sources.pop(actor, None)
        self.ray.kill(actor)

    def _lost(self, item: WorkItem, error: Exception) -> Iterator[Row]:
        """An item whose actor ended: again, or an error row."""
        self.attempts[item.row_id] += 1
        if self.attempts[item.row_id] < ATTEMPTS:
            self.todo.appendleft(item)
        else:
            message = f"its Ray actor ended {ATTEMPTS} times: {_cause(error)}"
            yield self.bench.failed(item, Status.ERROR, message)

    def _overdue(self) -> Iterator[Row]:
        now = time.monotonic()
        for reference in [reference for reference, job in self.running.items() if now > job.deadline]:
            job = self.running.pop(reference)
            self._end(job.actor)
            seconds = self.bench.config.execution.timeout
            yield self.bench.failed(job.item, Status.TIMEOUT, f"took longer than {seconds:g} s")

    def _complain(self) -> None:
        if self.starting and not self.running and time.monotonic() > self.complain_at:
            self.complain_at = float("inf")
            gpus = self.bench.config.execution.num_gpus
            log.warning(
                "no Ray actor has started for %g s; each needs %d CPUs and %g GPUs, and the cluster may have no room",
                PATIENCE, self.bench.config.threads, gpus,
            )  # fmt: skip


def _cause(error: Exception) -> str:
    """The last line of what Ray tells: the error itself, below the traceback of the actor."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
