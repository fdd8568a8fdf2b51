"""The Ray engine on a real cluster of this machine: same rows, also if an actor is killed."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from attnrobust.pipeline.plan import Shard
from attnrobust.pipeline.run import run
from attnrobust.rows import Row
from tests.test_pipeline_run import configured, plain, write_files

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # Ray leaves sockets and files open


def descendants() -> list[int]:
    """Processes that this one started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1]
                )
            except (OSError, IndexError):
                continue
    found = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted(found - {os.getpid()})


def actors() -> list[int]:
    """Processes of the actors, told by the title that Ray gives them."""
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants()}
    return [pid for pid, title in titles.items() if title.startswith(b"ray::_Actor")]


def test_two_actors_give_the_same_rows_even_if_one_is_killed(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    reference = plain(run(configured(files, "reference"), shard=Shard()).store.rows())
    killed = []

    def kill_one(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for number, row in enumerate(rows):
            if number == 1:
                killed.append(actors()[0])
                os.kill(killed[0], signal.SIGKILL)
            yield row

    config = configured(files, execution={"engine": "ray", "workers": 2})
    outcome = run(config, shard=Shard(), watch=kill_one)
    assert len(killed) == 1
    assert outcome.remaining == 0
    assert plain(outcome.store.rows()) == reference


def test_stopping_keeps_what_is_done(tmp_path: Path) -> None:
    stop = threading.Event()

    def stop_at_once(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for row in rows:
            stop.set()
            yield row

    config = configured(write_files(tmp_path), execution={"engine": "ray", "workers": 2})
    outcome = run(config, shard=Shard(), stop=stop, watch=stop_at_once)
    assert 1 <= outcome.computed <= 3
    assert outcome.remaining == 12 - outcome.computed
