"""Rows of work items on a Ray cluster; the only file that imports ray."""

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from attnrobust.errors import AttnRobustError, InputError
from attnrobust.runs.config import RunConfig
from attnrobust.runs.engines.schedule import THREAD_VARIABLES, Ended, Event, Ready, Refused, Schedule
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
    """Items one by one on Ray actors, each with its own model; see ``Schedule``.

    Joins the cluster that ``RAY_ADDRESS`` names, else starts one on this machine with as many CPUs as the actors take.
    Model and input files must be readable under the same paths on every node. Actors that the cluster has no room for
    wait; the others do the work.

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
        yield from Schedule(Cluster(ray, bench.config), bench, items, stop).rows()
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


class RayWorker:
    """One actor.

    Args:
        actor: Ray's handle of an ``_Actor``.
        kill: Ends it.
    """

    def __init__(self, actor: Any, kill: Callable[[Any], None]) -> None:
        self._actor, self._kill = actor, kill
        self.reference: Any = actor.load.remote()  # what it is at work on; None while it is idle

    def give(self, item: WorkItem) -> None:
        self.reference = self._actor.row.remote(item)

    def end(self, *, kill: bool) -> None:
        self._kill(self._actor)


class Cluster:
    """The actors of a configuration.

    Args:
        ray: The library, or what plays it in tests.
        config: The run's configuration.
    """

    noun = "Ray actor"
    cure = ""

    def __init__(self, ray: Any, config: RunConfig) -> None:
        self._ray, self._config = ray, config
        self._complain_at = time.monotonic() + PATIENCE
        self._loaded = False
        variables = dict.fromkeys(THREAD_VARIABLES, str(config.threads))
        self._actor_class = ray.remote(
            num_cpus=config.threads, num_gpus=config.execution.num_gpus, runtime_env={"env_vars": variables}
        )(_Actor)

    def start(self) -> RayWorker:
        return RayWorker(self._actor_class.remote(self._config.model_dump_json()), self._ray.kill)

    def wait(self, workers: Sequence[RayWorker], *, seconds: float) -> list[tuple[RayWorker, Event]]:
        at_work = {worker.reference: worker for worker in workers if worker.reference is not None}
        self._complain()
        if not at_work:
            return []
        ready, _ = self._ray.wait(list(at_work), num_returns=1, timeout=seconds)
        return [(at_work[reference], self._received(at_work[reference])) for reference in ready]

    def _received(self, worker: RayWorker) -> Event:
        reference, worker.reference = worker.reference, None
        try:
            message = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Ended(_cause(error))
        if isinstance(message, Row):
            return message
        self._loaded = self._loaded or message is None
        return Ready() if message is None else Refused(message)

    def _complain(self) -> None:
        if not self._loaded and time.monotonic() > self._complain_at:
            self._complain_at = float("inf")
            log.warning(
                "no Ray actor has started for %g s; each needs %d CPUs and %g GPUs, and the cluster may have no room",
                PATIENCE, self._config.threads, self._config.execution.num_gpus,
            )  # fmt: skip


def _cause(error: Exception) -> str:
    """The last line of what Ray tells: the error itself, below the traceback of the actor."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
