"""Rows of work items on a Ray cluster; the only file that imports ray."""

import threading
from collections import Counter, deque
from collections.abc import Generator, Sequence
from typing import Any

import torch

from attnrobust.errors import InputError
from attnrobust.pipeline.config import RunConfig
from attnrobust.pipeline.work import Workbench, WorkItem
from attnrobust.results import Status
from attnrobust.rows import Row

ATTEMPTS = 2


class _Actor:
    """A worker somewhere in the cluster; loads the model once."""

    def __init__(self, config: str) -> None:
        parsed = RunConfig.model_validate_json(config)
        torch.set_num_threads(parsed.threads)
        self._bench = Workbench(parsed)
        _ = self._bench.model

    def row(self, item: WorkItem) -> Row:
        return self._bench.row(item)


def compute_on_ray(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Items one by one on Ray actors; an actor that dies is replaced and its item tried once more.

    Joins the cluster that ``RAY_ADDRESS`` names, else starts one on this machine. Model and input files must be
    readable under the same paths on every node.

    Args:
        bench: The configuration's workbench.
        items: What to compute.
        stop: Once set, no further item is begun.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("engine ray needs Ray; pip install 'attnrobust[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        yield from _Cluster(ray, bench, items, stop).rows()
    finally:
        if started:
            ray.shutdown()


class _Cluster:
    """The actors and what is still to do."""

    def __init__(self, ray: Any, bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> None:
        self.ray, self.bench, self.stop = ray, bench, stop
        self.todo = deque(items)
        self.attempts: Counter[str] = Counter()
        self.running: dict[Any, tuple[Any, WorkItem]] = {}
        execution = bench.config.execution
        variables = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(bench.config.threads)
        )
        self.actor_class = ray.remote(
            num_cpus=bench.config.threads, num_gpus=execution.num_gpus, runtime_env={"env_vars": variables}
        )(_Actor)

    def rows(self) -> Generator[Row, None, None]:
        idle = [self._new_actor() for _ in range(min(max(1, self.bench.config.execution.workers), len(self.todo)))]
        while (self.todo and not self.stop.is_set()) or self.running:
            while idle and self.todo and not self.stop.is_set():
                self._give(idle.pop(), self.todo.popleft())
            finished, _ = self.ray.wait(list(self.running), num_returns=1, timeout=0.5)
            for reference in finished:
                actor, item = self.running.pop(reference)
                try:
                    row = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    self.ray.kill(actor)
                    idle.append(self._new_actor())
                    row = self._lost(item, error)
                else:
                    idle.append(actor)
                if row is not None:
                    yield row

    def _new_actor(self) -> Any:
        return self.actor_class.remote(self.bench.config.model_dump_json())

    def _give(self, actor: Any, item: WorkItem) -> None:
        self.running[actor.row.remote(item)] = (actor, item)

    def _lost(self, item: WorkItem, error: Exception) -> Row | None:
        """An item whose actor ended: again, or an error row."""
        self.attempts[item.row_id] += 1
        if self.attempts[item.row_id] < ATTEMPTS:
            self.todo.appendleft(item)
            return None
        cause = " ".join(str(error).split())[:200]
        return self.bench.failed(item, Status.ERROR, f"its Ray actor ended {ATTEMPTS} times: {cause}")
