"""The pool of worker processes when things go wrong; threads play the processes, so that they can be made to."""

import os
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar

import pytest

from attnrobust.runs.config import RunConfig
from attnrobust.runs.engines import compute
from attnrobust.runs.engines.processes import Processes, ProcessWorker, _environment
from attnrobust.runs.engines.schedule import Schedule, WorkerError, take_next
from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem
from tests.runs.test_run import configured, write_files


class PlayedWorker(ProcessWorker):
    """A worker in a thread: "dies" by closing its end, "hangs" by never answering."""

    plan: ClassVar[dict[str, str]] = {}  # input id to what happens
    start: ClassVar[str] = "ready"
    begun: ClassVar[list[str]] = []
    killed: ClassVar[int] = 0

    def __init__(self, config: RunConfig) -> None:
        self.connection, self.theirs = Pipe()
        self.bench = Workbench(config)
        threading.Thread(target=self.until_ended, daemon=True).start()

    def until_ended(self) -> None:
        with suppress(OSError, EOFError):  # the pool may have closed its end
            self.live()

    def live(self) -> None:
        if self.start == "die":
            self.theirs.close()
            return
        self.theirs.send(None if self.start == "ready" else self.start)
        while True:
            item = self.theirs.recv()
            name = self.bench.sources[item.source].id
            self.begun.append(name)
            what = self.plan.get(name, "answer")
            if what == "die once":
                self.plan[name] = "answer"
            if what.startswith("die"):
                self.theirs.close()
                return
            if what == "answer":
                self.theirs.send(Row(name, item.layer, 1, item.threat, "g", status="found", row_id=item.row_id))

    def death(self) -> str:
        return "signal 9"

    def end(self, *, kill: bool) -> None:
        type(self).killed += kill
        self.connection.close()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedWorker]:
    monkeypatch.setattr(Processes, "worker", PlayedWorker)
    monkeypatch.setattr(PlayedWorker, "plan", {})
    monkeypatch.setattr(PlayedWorker, "begun", [])
    monkeypatch.setattr(PlayedWorker, "killed", 0)
    return PlayedWorker


def scheduled(bench: Workbench, stop: threading.Event | None = None) -> Schedule[ProcessWorker]:
    return Schedule(Processes(bench.config), bench, bench.items(), stop or threading.Event())


def rows(tmp_path: Path, *, stop: threading.Event | None = None, **execution: Any) -> dict[str, Row]:
    config = configured(write_files(tmp_path), goals=["10%"], execution={"workers": 2} | execution)
    bench = Workbench(config)
    found = list(scheduled(bench, stop).rows())
    assert len({row.row_id for row in found}) == len(found)
    return {row.input_id: row for row in found}


def test_all_rows_come(tmp_path: Path, played: type[PlayedWorker]) -> None:
    found = rows(tmp_path)
    assert set(found) == {"x1", "x2", "x3", "x4", "x5", "x10"}
    assert {row.status for row in found.values()} == {"found"}


def test_an_item_whose_worker_dies_is_tried_again(tmp_path: Path, played: type[PlayedWorker]) -> None:
    played.plan["x3"] = "die once"
    found = rows(tmp_path)
    assert {row.status for row in found.values()} == {"found"}
    assert played.begun.count("x3") == 2


def test_an_item_that_ends_every_worker_is_an_error_row(tmp_path: Path, played: type[PlayedWorker]) -> None:
    played.plan["x3"] = "die"
    found = rows(tmp_path)
    assert found["x3"].status == "error"
    assert found["x3"].message == "its worker process ended 2 times (signal 9)"
    assert {row.status for name, row in found.items() if name != "x3"} == {"found"}
    assert len(found) == 6


def test_a_row_that_takes_too_long_ends_its_worker(tmp_path: Path, played: type[PlayedWorker]) -> None:
    played.plan.update(x2="hang", x5="hang")
    found = rows(tmp_path, timeout=1.0)
    assert {name for name, row in found.items() if row.status == "timeout"} == {"x2", "x5"}
    assert found["x2"].message == "took longer than 1 s"
    assert played.killed == 2
    assert len(found) == 6


def test_stopping_finishes_what_is_at_work(tmp_path: Path, played: type[PlayedWorker]) -> None:
    stop = threading.Event()
    config = configured(write_files(tmp_path), goals=["10%"], execution={"workers": 2})
    bench = Workbench(config)
    found = []
    for row in scheduled(bench, stop).rows():
        found.append(row.input_id)
        stop.set()
    assert sorted(found) == sorted(played.begun)
    assert 1 <= len(found) <= 3


def test_a_model_that_cannot_be_loaded_is_told_once(
    tmp_path: Path, played: type[PlayedWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "start", "there is no file layer.npz")
    with pytest.raises(WorkerError, match=r"there is no file layer\.npz"):
        rows(tmp_path)


def test_workers_that_cannot_start_end_the_run(
    tmp_path: Path, played: type[PlayedWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "start", "die")
    with pytest.raises(WorkerError, match=r"end while they start \(signal 9\); try fewer workers"):
        rows(tmp_path)


def test_leaving_early_ends_the_workers(tmp_path: Path, played: type[PlayedWorker]) -> None:
    played.plan.update(x1="hang")
    config = configured(write_files(tmp_path), goals=["10%"], execution={"workers": 2})
    bench = Workbench(config)
    generator = compute(bench, bench.items(), threading.Event())
    next(generator)
    time.sleep(0.01)
    generator.close()
    assert played.killed >= 1


def test_a_worker_stays_with_its_input() -> None:
    """So that the tokens of an input are captured by one worker, for all layers and threats."""
    todo = deque(WorkItem(f"{source}{layer}", source, layer, "t", 0) for source in range(3) for layer in "ab")
    assert take_next(todo, None, set()).row_id == "0a"
    assert take_next(todo, None, {0}).row_id == "1a"
    assert take_next(todo, 1, {0}).row_id == "1b"
    assert take_next(todo, 1, {0}).row_id == "2a"
    assert take_next(todo, 0, {2}).row_id == "0b"
    assert take_next(todo, 0, {2}).row_id == "2b"  # nothing else is left: it helps
    assert not todo


def test_each_input_is_captured_by_one_worker(
    tmp_path: Path, played: type[PlayedWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    givers: dict[int, set[int]] = {}
    give = played.give

    def recorded(worker: PlayedWorker, item: WorkItem) -> None:
        givers.setdefault(item.source, set()).add(id(worker))
        give(worker, item)

    monkeypatch.setattr(played, "give", recorded)
    bench = Workbench(configured(write_files(tmp_path), execution={"workers": 2}))
    assert len(list(scheduled(bench).rows())) == 12
    assert len(givers) == 6
    assert sum(len(workers) for workers in givers.values()) <= 7  # the last input may be shared


def test_variables_of_workers_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNROBUST_A", "old")
    monkeypatch.delenv("ATTNROBUST_B", raising=False)
    with _environment({"ATTNROBUST_A": "1", "ATTNROBUST_B": "2"}):
        assert (os.environ["ATTNROBUST_A"], os.environ["ATTNROBUST_B"]) == ("1", "2")
    assert os.environ["ATTNROBUST_A"] == "old"
    assert "ATTNROBUST_B" not in os.environ
