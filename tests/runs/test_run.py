"""Runs: every row once, the same by every engine and shard, and nothing lost by any end."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnrobust.errors import InputError
from attnrobust.results import Status
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.plan import Shard, parse_shard, shard_from_environment
from attnrobust.runs.rows import Row, without_times
from attnrobust.runs.run import resume, run
from attnrobust.runs.storage.files import MANIFEST
from attnrobust.runs.storage.store import PARTS, RunStore
from attnrobust.runs.work import Workbench
from tests.layer_files import write_layer

NO_SHARD = Shard()


def write_files(tmp_path: Path) -> Path:
    write_layer(tmp_path, np.random.default_rng(0), x1=1, x2=2, x3=3, x4=3, x5=5, x10="x2")
    return tmp_path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A layer with two heads and six inputs, two of them equal."""
    return write_files(tmp_path)


def configured(files: Path, out: str = "out", **changes: Any) -> RunConfig:
    values = {
        "model": str(files / "layer.npz"),
        "tokens": files / "x.npz",
        "goals": ["10%", "1%"],
        "certificates": ["castin2024-derived"],
        "attack": {"restarts": 2, "steps": 5},
        "output": files / out,
        "execution": {"part_rows": 3},
    }
    return make_config(values | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of an undisturbed run; other directories hold the same files, so they have the same rows."""
    files = write_files(tmp_path_factory.mktemp("reference"))
    return without_times(run(configured(files), shard=NO_SHARD).store.rows())


def stopping_after(count: int, stop: threading.Event) -> Callable[[Iterator[Row], int], Iterator[Row]]:
    def watch(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for number, row in enumerate(rows, start=1):
            if number == count:
                stop.set()
            yield row

    return watch


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_every_combination_has_one_row(reference: list[Row]) -> None:
    assert len(reference) == 6 * 2
    assert [row.input_id for row in reference[::2]] == ["x1", "x2", "x3", "x4", "x5", "x10"]
    assert {row.goal for row in reference} == {"displacement 10%", "displacement 1%"}
    assert {row.status for row in reference} == {"found"}
    assert len({row.row_id for row in reference}) == 12


def test_equal_inputs_are_not_merged_and_agree(reference: list[Row]) -> None:
    by_id = {(row.input_id, row.goal): row for row in reference}
    one, other = by_id["x2", "displacement 1%"], by_id["x10", "displacement 1%"]
    assert one.row_id != other.row_id
    assert one.attack_radius == other.attack_radius


def test_row_ids_are_about_content(files: Path) -> None:
    """Another name, another order or another neighbour of the file changes no id."""
    ids = {item.row_id for item in Workbench(configured(files)).items()}
    with np.load(files / "x.npz") as archive:
        arrays = dict(archive)
    renamed = {f"y{key}": arrays[key] for key in reversed(list(arrays))}
    np.savez(files / "y.npz", **renamed, extra=np.ones((2, 4)))
    again = {item.row_id for item in Workbench(configured(files, tokens=files / "y.npz")).items()}
    assert ids < again
    assert len(again) == len(ids) + 2


def test_a_second_call_has_nothing_to_do(files: Path) -> None:
    config = configured(files)
    first, second = run(config, shard=NO_SHARD), run(config, shard=NO_SHARD)
    assert (first.computed, second.computed) == (12, 0)
    assert len(second.store.parts()) == 4


def test_a_row_that_cannot_be_posed_leaves_the_others(files: Path) -> None:
    rows = run(configured(files, threats=["token:2"]), shard=NO_SHARD).store.rows()
    assert [row.status for row in rows[::2]] == ["error", "error", "found", "found", "found", "error"]


def test_what_no_input_can_answer_is_refused_before_any_work(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "row", lambda *_: pytest.fail("a row was computed"))
    (files / "x.txt").write_text("One.\nTwo.\n", encoding="utf-8")
    np.savez(files / "wide.npz", a=np.zeros((3, 7)))
    for changes, says in (
        ({"tokens": None, "texts": files / "x.txt"}, "no tokenizer"),
        ({"tokens": files / "wide.npz"}, "input 'a' has tokens of width 7, the layer takes 4"),
        (
            {"threats": ["frobenius", "token:9"]},
            "no input is long enough for the threat token:9: the longest has 5 tokens",
        ),
    ):
        with pytest.raises(InputError, match=says):
            run(configured(files, **changes), shard=NO_SHARD)
    assert not (files / "out").exists()


def test_the_same_goal_twice_is_refused(files: Path) -> None:
    with pytest.raises(InputError, match="name each once"):
        run(configured(files, goals=["10%", "0.1e2%"]), shard=NO_SHARD)


# ---- interruption ----------------------------------------------------------------------------------------------------


def test_stopping_keeps_what_is_done_and_resume_does_the_rest(files: Path, reference: list[Row]) -> None:
    stop = threading.Event()
    outcome = run(configured(files), shard=NO_SHARD, stop=stop, watch=stopping_after(4, stop))
    assert (outcome.computed, outcome.remaining) == (4, 8)
    outcome = resume(files / "out", shard=NO_SHARD)
    assert (outcome.computed, outcome.remaining) == (8, 0)
    assert without_times(outcome.store.rows()) == reference


def test_an_exception_on_the_way_keeps_what_is_done(files: Path, reference: list[Row]) -> None:
    def explode(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for number, row in enumerate(rows):
            if number == 5:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        run(configured(files), shard=NO_SHARD, watch=explode)
    assert len(RunStore.open(files / "out").rows()) == 5
    assert without_times(resume(files / "out", shard=NO_SHARD).store.rows()) == reference


def test_a_full_disk_is_told_and_loses_nothing_that_was_written(
    files: Path, reference: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # manifest and its directory, then two parts with their directory
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; what was written before is intact"):
        run(configured(files), shard=NO_SHARD)
    monkeypatch.undo()
    assert len(RunStore.open(files / "out").rows()) == 6
    assert not list((files / "out").rglob("*.tmp"))
    assert without_times(resume(files / "out", shard=NO_SHARD).store.rows()) == reference


def test_an_output_that_becomes_read_only_loses_nothing_that_was_written(
    files: Path, reference: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    stop = threading.Event()
    run(configured(files), shard=NO_SHARD, stop=stop, watch=stopping_after(4, stop))
    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    with pytest.raises(InputError, match=r"cannot write to .*parts: Read-only file system; what was written before is"):
        resume(files / "out", shard=NO_SHARD)
    store = RunStore.open(files / "out")
    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(InputError, match=r"cannot write to .*out: Read-only file system"), store.writing():
        pytest.fail("the lock was taken")
    with pytest.raises(InputError, match=r"cannot read .*manifest\.json: Read-only file system"):
        RunStore.open(files / "out")
    monkeypatch.undo()
    assert len(RunStore.open(files / "out").rows()) == 4
    assert without_times(resume(files / "out", shard=NO_SHARD).store.rows()) == reference


def test_a_new_run_on_a_read_only_disk_is_refused_before_any_work(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(Workbench, "row", lambda *_: pytest.fail("a row was computed"))
    with pytest.raises(InputError, match="Read-only file system; choose another --out"):
        run(configured(files), shard=NO_SHARD)
    assert not (files / "out").exists()


def test_killed_runs_resume_without_losing_or_doubling(files: Path, reference: list[Row]) -> None:
    """SIGKILL as soon as the first part is on disk."""
    config = configured(files, execution={"part_rows": 1})
    path = files / "run.yaml"
    path.write_text(config.as_yaml(), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "attnrobust", "run", str(path), "-q"], stderr=subprocess.DEVNULL)
    parts = files / "out" / PARTS
    while not list(parts.glob("*.parquet")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = RunStore.open(files / "out")
    before = len(store.rows())
    assert before >= 1
    outcome = resume(files / "out", shard=NO_SHARD)
    assert outcome.computed == 12 - before
    ids = [i for part in outcome.store.parts() for i in _ids(part)]
    assert len(ids) == len(set(ids)) == 12
    assert without_times(outcome.store.rows()) == reference


def _ids(part: Path) -> list[str]:
    import pyarrow.parquet as pq

    found: list[str] = pq.read_table(part).column("row_id").to_pylist()
    return found


# ---- what a store refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"attack": {"restarts": 3, "steps": 5}}, "attack.restarts was 2, is 3"),
        ({"goals": ["10%"]}, "goals was"),
        ({"certificates": ["spread-lipschitz"]}, "certificates was"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(files: Path, changes: dict[str, Any], says: str) -> None:
    run(configured(files), shard=NO_SHARD)
    with pytest.raises(InputError, match="holds another run") as caught:
        run(configured(files, **changes), shard=NO_SHARD)
    assert says in str(caught.value)


def test_another_model_or_input_is_refused(files: Path) -> None:
    run(configured(files), shard=NO_SHARD)
    for name, key in (("layer.npz", "model"), ("x.npz", "inputs")):
        with np.load(files / name) as archive:
            arrays = dict(archive)
        changed = {**arrays, next(iter(arrays)): next(iter(arrays.values())) * 1.001}
        np.savez(files / name, **changed)
        with pytest.raises(InputError, match=f"{key} was "):
            resume(files / "out", shard=NO_SHARD)
        np.savez(files / name, **arrays)


def test_moved_files_are_the_same_run(files: Path) -> None:
    run(configured(files), shard=NO_SHARD)
    (files / "x.npz").rename(files / "moved.npz")
    assert run(configured(files, tokens=files / "moved.npz"), shard=NO_SHARD).computed == 0


def test_a_truncated_manifest_is_told_with_a_cure_that_works(files: Path, reference: list[Row]) -> None:
    run(configured(files), shard=NO_SHARD)
    path = files / "out" / MANIFEST
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(InputError, match="is damaged") as caught:
        resume(files / "out", shard=NO_SHARD)
    assert "copy parts/ there" in str(caught.value)
    stop = threading.Event()
    stop.set()
    run(configured(files, "new"), shard=NO_SHARD, stop=stop)
    (files / "out" / PARTS).rename(files / "new" / PARTS)
    outcome = resume(files / "new", shard=NO_SHARD)
    assert outcome.computed == 0
    assert without_times(outcome.store.rows()) == reference


def test_an_edited_manifest_is_refused(files: Path) -> None:
    run(configured(files), shard=NO_SHARD)
    path = files / "out" / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    values["meaning"]["seed"] = 9
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="was edited"):
        RunStore.open(files / "out")


def test_a_lost_manifest_is_not_started_over(files: Path) -> None:
    run(configured(files), shard=NO_SHARD)
    (files / "out" / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"parts of a run but no manifest\.json"):
        run(configured(files), shard=NO_SHARD)
    with pytest.raises(InputError, match="holds no run"):
        resume(files / "out")


def test_a_damaged_part_is_named_and_can_be_computed_again(files: Path, reference: list[Row]) -> None:
    store = run(configured(files), shard=NO_SHARD).store
    victim = store.parts()[1]
    victim.write_bytes(victim.read_bytes()[:-50])
    with pytest.raises(InputError, match=victim.name):
        resume(files / "out", shard=NO_SHARD)
    victim.unlink()
    outcome = resume(files / "out", shard=NO_SHARD)
    assert outcome.computed == 3
    assert without_times(outcome.store.rows()) == reference


def test_parts_of_another_run_are_refused(files: Path) -> None:
    run(configured(files), shard=NO_SHARD)
    other = run(configured(files, "other", seed=5), shard=NO_SHARD).store
    other.parts()[0].rename(files / "out" / PARTS / "foreign.parquet")
    with pytest.raises(InputError, match=r"foreign\.parquet belongs to another run"):
        RunStore.open(files / "out").rows()


def test_a_row_in_two_parts_counts_once(files: Path, reference: list[Row]) -> None:
    """Two shards that overlapped, or a part that was copied."""
    store = run(configured(files), shard=NO_SHARD).store
    (files / "out" / PARTS / "again.parquet").write_bytes(store.parts()[0].read_bytes())
    assert without_times(store.rows()) == reference


def test_two_writers_of_one_shard_are_refused(files: Path) -> None:
    store = run(configured(files), shard=NO_SHARD).store
    with store.writing("all"), pytest.raises(InputError, match="another process is at work"):
        resume(files / "out", shard=NO_SHARD)


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_shards_together_are_the_run(files: Path, reference: list[Row]) -> None:
    counts = [run(configured(files), shard=Shard(i, 5)).computed for i in (3, 0, 2, 4, 1)]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert without_times(RunStore.open(files / "out").rows()) == reference


@pytest.mark.parametrize(("text", "expected"), [("1/1", Shard()), ("2/3", Shard(1, 3))])
def test_shards_count_from_one(text: str, expected: Shard) -> None:
    assert parse_shard(text) == expected


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "a/b", "-1/3", ""])
def test_shards_that_do_not_exist(text: str) -> None:
    with pytest.raises(InputError, match="shard"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Shard()),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Shard(1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Shard(0, 2)),
        ({"RANK": "1"}, Shard()),
    ],
)
def test_shards_of_launchers(environment: dict[str, str], expected: Shard) -> None:
    assert shard_from_environment(environment) == expected


def test_a_launcher_that_speaks_nonsense() -> None:
    with pytest.raises(InputError, match="must be numbers"):
        shard_from_environment({"RANK": "x", "WORLD_SIZE": "4"})


# ---- processes -------------------------------------------------------------------------------------------------------


def test_worker_processes_give_the_same_rows_even_if_one_is_killed(files: Path, reference: list[Row]) -> None:
    def kill_one(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for number, row in enumerate(rows):
            if number == 1:
                active_children()[0].kill()
            yield row

    config = configured(files, execution={"workers": 2})
    outcome = run(config, shard=NO_SHARD, watch=kill_one)
    assert outcome.remaining == 0
    assert without_times(outcome.store.rows()) == reference
    assert active_children() == []
    assert all(row.status is not Status.ERROR for row in outcome.store.rows())
