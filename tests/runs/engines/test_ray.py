"""The Ray engine: on a played cluster when things go wrong, and on a real one of this machine."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import attnrobust.runs.engines.ray as ray_engine
from attnrobust.runs.engines.ray import Cluster, RayWorker
from attnrobust.runs.engines.schedule import Schedule, WorkerError
from attnrobust.runs.plan import Shard
from attnrobust.runs.rows import Row, without_times
from attnrobust.runs.run import run
from attnrobust.runs.work import Workbench, WorkItem
from tests.runs.test_run import configured, write_files

# ---- a played cluster ------------------------------------------------------------------------------------------------


class PlayedError(Exception):
    """What Ray raises for an actor that ended."""


class Reference:
    """What a call of an actor gives at once; ``value`` may be an exception, ``never`` makes it hang."""

    def __init__(self, value: object, *, never: bool = False) -> None:
        self.value, self.never = value, never


class PlayedActor:
    """The methods of one actor."""

    def __init__(self, load: object, row: object) -> None:
        self.load, self.row = load, row


class PlayedRay:
    """As much of Ray as the engine uses; ``plan`` says what happens to the rows of an input, ``starts`` to actors."""

    exceptions = SimpleNamespace(RayError=PlayedError)

    def __init__(self, bench: Workbench) -> None:
        self.names = [source.id for source in bench.sources]
        self.plan: dict[str, str] = {}
        self.starts: list[object] = []
        self.begun: list[str] = []
        self.made: list[Any] = []
        self.killed: list[Any] = []

    def remote(self, **_: Any) -> Callable[[type], Any]:
        return lambda _: SimpleNamespace(remote=self.actor)

    def actor(self, _: str) -> Any:
        start = self.starts.pop(0) if self.starts else None
        load = SimpleNamespace(remote=lambda: Reference(start, never=start == "no room"))
        made = PlayedActor(load, SimpleNamespace(remote=self.row))
        self.made.append(made)
        return made

    def row(self, item: WorkItem) -> Reference:
        name = self.names[item.source]
        self.begun.append(name)
        what = self.plan.get(name, "answer")
        if what == "die once":
            self.plan[name] = "answer"
        if what.startswith("die"):
            return Reference(PlayedError("Traceback\n  the actor\ndied\n"))
        row = Row(name, item.layer, 1, item.threat, "g", status="found", row_id=item.row_id)
        return Reference(row, never=what == "hang")

    def wait(self, references: list[Reference], *, num_returns: int, timeout: float) -> tuple[list[Reference], None]:
        assert len(references) == len(set(references)) >= num_returns
        ready = [reference for reference in references if not reference.never][:num_returns]
        if not ready:
            threading.Event().wait(timeout)
        return ready, None

    def get(self, reference: Reference) -> object:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor: object) -> None:
        assert actor not in self.killed
        self.killed.append(actor)


def cluster(
    tmp_path: Path, *, stop: threading.Event | None = None, **execution: Any
) -> tuple[PlayedRay, Schedule[RayWorker]]:
    config = configured(write_files(tmp_path), goals=["10%"], execution={"engine": "ray", "workers": 2} | execution)
    bench = Workbench(config)
    played = PlayedRay(bench)
    return played, Schedule(Cluster(played, bench.config), bench, bench.items(), stop or threading.Event())


def statuses(played: PlayedRay, made: Schedule[RayWorker]) -> dict[str, str]:
    """Status by input of all rows; every actor that was made is ended, once."""
    found = list(made.rows())
    assert len({row.row_id for row in found}) == len(found)
    assert sorted(map(id, played.killed)) == sorted(map(id, played.made))
    return {row.input_id: str(row.status) for row in found}


ALL = dict.fromkeys(("x1", "x2", "x3", "x4", "x5", "x10"), "found")


def test_all_rows_come(tmp_path: Path) -> None:
    played, made = cluster(tmp_path)
    assert statuses(played, made) == ALL
    assert len(played.made) == 2


def test_an_item_whose_actor_dies_is_tried_again(tmp_path: Path) -> None:
    played, made = cluster(tmp_path)
    played.plan["x3"] = "die once"
    assert statuses(played, made) == ALL
    assert played.begun.count("x3") == 2
    assert len(played.made) == 3


def test_an_item_that_ends_every_actor_is_an_error_row(tmp_path: Path) -> None:
    played, made = cluster(tmp_path)
    played.plan["x3"] = "die"
    found = {row.input_id: row for row in made.rows()}
    assert found["x3"].status == "error"
    assert found["x3"].message == "its Ray actor ended 2 times (died)"
    assert {name: str(row.status) for name, row in found.items()} == ALL | {"x3": "error"}


def test_a_row_that_takes_too_long_ends_its_actor(tmp_path: Path) -> None:
    played, made = cluster(tmp_path, timeout=0.2)
    played.plan.update(x2="hang", x5="hang")
    assert statuses(played, made) == ALL | {"x2": "timeout", "x5": "timeout"}
    assert len(played.made) in (3, 4)  # an actor that ends when nothing is left to do is not replaced


def test_actors_without_room_do_not_hold_up_the_others(tmp_path: Path) -> None:
    played, made = cluster(tmp_path, workers=3)
    played.starts = ["no room", None, "no room"]
    assert statuses(played, made) == ALL
    assert len(played.made) == 3


def test_a_cluster_without_room_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_engine, "PATIENCE", 0.0)
    stop = threading.Event()
    played, made = cluster(tmp_path, stop=stop)
    played.starts = ["no room"] * 2
    threading.Timer(0.3, stop.set).start()
    assert statuses(played, made) == {}
    assert [record.message for record in caplog.records] == [
        "no Ray actor has started for 0 s; each needs 1 CPUs and 0 GPUs, and the cluster may have no room"
    ]


def test_a_model_that_cannot_be_loaded_is_told_once(tmp_path: Path) -> None:
    played, made = cluster(tmp_path)
    played.starts = ["there is no file layer.npz"] * 2
    with pytest.raises(WorkerError, match=r"there is no file layer\.npz"):
        statuses(played, made)
    assert played.begun == []


def test_actors_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    played, made = cluster(tmp_path)
    played.starts = [PlayedError("no such node"), None, PlayedError("no such node")]
    assert statuses(played, made) == ALL  # one bad start is not the end
    played, made = cluster(tmp_path)
    played.starts = [PlayedError("no such node")] * 5
    with pytest.raises(WorkerError, match=r"Ray actors end while they start \(no such node\)$"):
        statuses(played, made)


def test_stopping_finishes_what_is_at_work(tmp_path: Path) -> None:
    stop = threading.Event()
    played, made = cluster(tmp_path, stop=stop)
    found = []
    for row in made.rows():
        found.append(row.input_id)
        stop.set()
    assert sorted(found) == sorted(played.begun)
    assert 1 <= len(found) <= 3


# ---- a real cluster --------------------------------------------------------------------------------------------------


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


def titles() -> dict[int, bytes]:
    """Command lines of Ray's processes under this one; its actors have the title of their class."""
    found = {}
    for pid in descendants():
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
    return {pid: title for pid, title in found.items() if b"ray" in title}


@pytest.mark.slow  # half a minute of processor time, most of it Ray's own
@pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and files open
def test_two_actors_give_the_same_rows_even_if_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cluster for all that needs a real one: it takes seconds to start."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", ray_engine.LOCAL)
    files = write_files(tmp_path)
    reference = without_times(run(configured(files, "reference"), shard=Shard()).store.rows())
    config = configured(files, execution={"engine": "ray", "workers": 2})
    killed: list[int] = []

    def kill_one(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for number, row in enumerate(rows):
            if number == 1:
                actors = [pid for pid, title in titles().items() if title.startswith(b"ray::_Actor")]
                killed.append(actors[0])
                os.kill(killed[0], signal.SIGKILL)
            yield row

    stop = threading.Event()

    def stop_at_once(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for row in rows:
            stop.set()
            yield row

    try:
        ray_engine._connect(ray, config)
        outcome = run(config, shard=Shard(), watch=kill_one)
        assert len(killed) == 1
        assert outcome.remaining == 0
        assert without_times(outcome.store.rows()) == reference

        stopped = configured(files, "stopped", execution={"engine": "ray", "workers": 1})
        outcome = run(stopped, shard=Shard(), stop=stop, watch=stop_at_once)
        assert (outcome.computed, outcome.remaining) == (
            2,
            10,
        )  # the actor had its next item before the first was handed on
    finally:
        ray.shutdown()
    assert titles() == {}
