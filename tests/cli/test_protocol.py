"""``bench --protocol`` as it is typed, with a small protocol in place of the standard one."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from attnrobust.cli import ExitCode
from attnrobust.runs import protocol, work
from attnrobust.runs.config import RunConfig
from attnrobust.runs.evaluate import RowTask, evaluate_row
from attnrobust.runs.protocol_result import read_document
from attnrobust.runs.rows import Row
from tests.cli.test_compare import Run, Said, said_by
from tests.layer_files import write_layer
from tests.protocol_cases import SMALL


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(protocol, "PROTOCOLS", {"standard": SMALL})
    monkeypatch.setattr("attnrobust.runs.protocol_result.PROTOCOLS", {"standard": SMALL})
    write_layer(tmp_path, np.random.default_rng(0), x2=2, x3=3)

    def call(*arguments: object) -> Said:
        common = ("bench", tmp_path / "layer.npz", "--tokens", tmp_path / "x.npz", "--protocol", "standard", "-q")
        return said_by(capsys, *common, *arguments)

    return call


def test_two_runs_have_the_same_results(cli: Run, tmp_path: Path) -> None:
    said = cli("--out", tmp_path / "a.json", "--json")
    assert said.code == ExitCode.OK
    first = read_document(tmp_path / "a.json")
    assert json.loads(said.out) == first
    assert cli("--out", tmp_path / "b.json", "--workers", 0).code == ExitCode.OK
    second = read_document(tmp_path / "b.json")
    assert second["results"] == first["results"]
    assert second["digest"] == first["digest"]
    assert str(tmp_path) not in json.dumps(first)
    assert first["model"]["name"] == "layer.npz"
    assert [one["id"] for one in first["inputs"]["each"]] == ["x2", "x3"]
    row = first["rows"][0]
    assert set(row["certificates"]) == {"castin2024-derived"}  # the other is of another kind of layer
    assert 0 < row["certified_radius"] <= row["attack_radius"]


def test_an_interrupted_measurement_goes_on(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[RowTask] = []

    def interrupted(task: RowTask, config: RunConfig) -> Row:
        row = evaluate_row(task, config)
        computed.append(task)
        if len(computed) == 1:
            signal.raise_signal(signal.SIGINT)
        return row

    monkeypatch.setattr(work, "evaluate_row", interrupted)
    asked = ("--out", tmp_path / "a.json", "--workers", 0)
    said = cli(*asked)
    assert said.code == ExitCode.INTERRUPTED
    assert "1 rows are left and no result is written" in said.err
    assert not (tmp_path / "a.json").exists()
    assert cli(*asked).code == ExitCode.OK
    assert len(computed) == 2  # the first row was kept
    assert cli("--out", tmp_path / "b.json", "--workers", 0).code == ExitCode.OK
    assert len(computed) == 4
    resumed, whole = (read_document(tmp_path / name) for name in ("a.json", "b.json"))
    assert resumed["results"] == whole["results"]
    assert resumed["digest"] == whole["digest"]


@pytest.mark.parametrize("option", [
    ("--attacks", "token-moving"), ("--threat", "per-token"), ("--tolerance", "1%"), ("--seed", 3), ("--steps", 2),
    ("--restarts", 2), ("--queries", 9), ("--seconds", 9), ("--epsilons", "0.1"), ("--budget", "x steps=2"),
    ("--device", "cuda"), ("--timeout", 9), ("--at", "embeddings"), ("--goal", "decision"), ("--label", 1),
])  # fmt: skip
def test_options_that_change_numbers_are_refused(cli: Run, option: tuple[str, object]) -> None:
    assert f"fixes what {option[0]} would change" in cli(*option).refusal()


def test_the_result_is_a_json_file(cli: Run, tmp_path: Path) -> None:
    assert "ends in .json" in cli("--out", tmp_path / "folder").refusal()
