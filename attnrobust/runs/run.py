"""A run from configuration to rows on disk, and how it goes on after any end."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from attnrobust.errors import InputError
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.engines import compute
from attnrobust.runs.engines.here import torch_threads
from attnrobust.runs.plan import Shard, make_manifest, shard_from_environment
from attnrobust.runs.rows import Row
from attnrobust.runs.storage.store import RunStore
from attnrobust.runs.work import Workbench

Watcher = Callable[[Iterator[Row], int], Iterable[Row]]
"""Passes rows on and sees each; gets the number that will come."""


@dataclass(frozen=True)
class Outcome:
    """How a call of ``run`` ended.

    Args:
        store: The rows on disk.
        computed: Rows computed by this call.
        remaining: Rows of this shard that are still to do.
    """

    store: RunStore
    computed: int
    remaining: int


def run(
    config: RunConfig, *, shard: Shard | None = None, stop: threading.Event | None = None, watch: Watcher | None = None
) -> Outcome:
    """Compute every row of a configuration that is not yet on disk.

    Rows reach the disk in parts, each whole or not at all; so after any end, even a power cut, the same call goes on
    where the last part ended.

    Args:
        config: What to compute, where to, and how.
        shard: The share of the work; None reads RANK/WORLD_SIZE or SLURM's variables, else takes all.
        stop: Once set, running rows are finished and written, and the call returns.
        watch: Sees the rows as they come (progress).

    Returns:
        The store and what is left.

    Raises:
        InputError: The configuration cannot be used, the directory holds another run, or the disk refuses a part.
    """
    shard = shard_from_environment(dict(os.environ)) if shard is None else shard
    stop = threading.Event() if stop is None else stop
    bench = Workbench(config)
    items = bench.items()
    if len({item.row_id for item in items}) != len(items):
        raise InputError("two goals or threats of the configuration are the same; name each once")
    bench.refuse_hopeless()
    store = RunStore.create(config.output, make_manifest(bench, items))
    mine = shard.of(items)
    with store.writing(shard.name):
        done = store.done()
        todo = [item for item in mine if item.row_id not in done]
        with closing(compute(bench, todo, stop)) as rows:
            computed = _write(store, watch(rows, len(todo)) if watch is not None else rows, config)
    return Outcome(store, computed, len(todo) - computed)


def rows_in_memory(bench: Workbench) -> Iterator[Row]:
    """Every row of a configuration, computed in this process when it is asked for and stored nowhere.

    Whole networks are many small operations, which wait for each other on several threads: on two busy cores the demo
    of decisions took seven times the processor time on two threads.
    """
    with torch_threads(bench.config.threads) if bench.config.at is not None else nullcontext():
        for item in bench.items():
            yield replace(bench.row(item), row_id=None)


def resume(
    directory: Path,
    *,
    changes: Mapping[str, object] | None = None,
    shard: Shard | None = None,
    stop: threading.Event | None = None,
    watch: Watcher | None = None,
) -> Outcome:
    """Go on with the run in a directory; inputs and model must still be the same, by content.

    Args:
        directory: The run's output directory.
        changes: Execution settings (engine, workers, timeout, ...) that replace those of the run.
        shard: As in ``run``.
        stop: As in ``run``.
        watch: As in ``run``.

    Raises:
        InputError: No run there, or the model, an input file or the configuration is no longer what it was.
    """
    stored = RunStore.open(directory).manifest.config
    execution = dict(stored["execution"]) | {k: v for k, v in (changes or {}).items() if v is not None}
    config = make_config(dict(stored) | {"output": str(directory.absolute()), "execution": execution})
    return run(config, shard=shard, stop=stop, watch=watch)


def _write(store: RunStore, rows: Iterable[Row], config: RunConfig) -> int:
    """Write rows in parts as they come; what is finished is written whatever ends the loop."""
    waiting: list[Row] = []
    computed, since = 0, time.monotonic()
    try:
        for row in rows:
            waiting.append(row)
            computed += 1
            full = len(waiting) >= config.execution.part_rows
            if full or time.monotonic() - since >= config.execution.part_seconds:
                batch, waiting = waiting, []
                store.append(batch)
                since = time.monotonic()
    finally:
        if waiting:
            store.append(waiting)
    return computed
