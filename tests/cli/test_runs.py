"""Commands for many inputs."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attnrobust.cli import ExitCode
from attnrobust.runs.rows import row_from_dict, without_times
from attnrobust.runs.storage.store import RunStore
from tests.cli.test_compare import Run, Said, said_by
from tests.runs.test_run import configured, write_files


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Said:
        return said_by(capsys, *arguments)

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    files = write_files(tmp_path)
    path = files / "run.yaml"
    path.write_text(configured(files, goals=["10%"]).as_yaml(), encoding="utf-8")
    return path


def test_config_prints_what_counts(cli: Run, config: Path) -> None:
    said = cli("config", config, "--seed", 7, "--tolerance", "1%", "--tolerance", "0.5", "--workers", 3, "--print")
    assert said.code == ExitCode.OK
    values = yaml.safe_load(said.out)
    assert values["seed"] == 7
    assert [goal["tolerance"] for goal in values["goals"]] == ["1%", "0.5"]
    assert values["execution"]["workers"] == 3
    assert values["attack"]["steps"] == 5


def test_config_names_what_is_wrong(cli: Run, config: Path) -> None:
    config.write_text(config.read_text(encoding="utf-8") + "sede: 3\n", encoding="utf-8")
    assert "unknown key sede; did you mean seed?" in cli("config", config).refusal()


def test_run_resume_export(cli: Run, config: Path) -> None:
    out = config.parent / "out"
    said = cli("run", config, "--shard", "1/2", "-q")
    assert said.code == ExitCode.OK
    assert "3 rows computed, 3 of 6" in said.err
    said = cli("resume", out, "-q")
    assert said.code == ExitCode.OK
    assert "3 rows computed, 6 of 6" in said.err
    assert "displacement 10%" in said.out
    assert cli("export", out, "--csv", out / "rows.csv", "--jsonl", out / "rows.jsonl").code == ExitCode.OK
    rows = RunStore.open(out).rows()
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row_from_dict(json.loads(line)) for line in lines] == rows
    with (out / "rows.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [float(cell["attack_radius"]) for cell in cells] == [row.attack_radius for row in rows]
    assert json.loads(cells[0]["certificates"])["castin2024-derived"]["radius"] == rows[0].certified_radius
    assert cells[0]["margin"] == ""


def test_run_without_a_file(cli: Run, config: Path, tmp_path: Path) -> None:
    said = cli(
        *("run", "--model", tmp_path / "layer.npz", "--tokens", tmp_path / "x.npz", "--layer", "att*"),
        *("--methods", "castin2024-derived", "--threat", "any-token", "--out", tmp_path / "flags", "-q"),
    )
    assert said.code == ExitCode.OK
    assert {row.threat for row in RunStore.open(tmp_path / "flags").rows()} == {"any-token"}


def test_fail_under_looks_at_all_rows_on_disk(cli: Run, config: Path) -> None:
    assert cli("run", config, "-q", "--fail-under", 0).code == ExitCode.OK
    assert cli("resume", config.parent / "out", "-q", "--fail-under", 1e3).code == ExitCode.BELOW


def test_wrong_usage_is_one_line(cli: Run, config: Path, tmp_path: Path) -> None:
    assert "holds no run" in cli("resume", tmp_path / "nowhere").refusal()
    assert "model is missing" in cli("run").refusal()
    assert "shard" in cli("run", config, "--shard", "3/2").refusal()
    assert "nearest: attention" in cli("run", config, "--layer", "layer.*.attention").refusal()
    assert "set workers to 1 or more" in cli("run", config, "--timeout", 3).refusal()
    cli("run", config, "-q")
    assert "name a file" in cli("export", tmp_path / "out").refusal()
    assert "cannot write" in cli("export", tmp_path / "out", "--csv", tmp_path / "no" / "x.csv").refusal()
    assert "seed was 0, is 4" in cli("run", config, "--seed", 4).refusal()


def test_interruption_finishes_the_row_and_says_how_to_go_on(config: Path) -> None:
    out = config.parent / "out"
    command = [sys.executable, "-m", "attnrobust", "run", str(config), "--tolerance", "10%", "--tolerance", "1%"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    assert process.stderr.readline() == "[0/12] begins\n"
    while not (first := process.stderr.readline()).startswith("["):
        assert "still at work" in first
    assert first.startswith("[1/12]")  # the first row is done
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "finishing the running rows" in err
    assert f"go on with: attnrobust resume {out}" in err
    done = len(RunStore.open(out).rows())
    assert 1 <= done < 12
    resumed = subprocess.run(
        [sys.executable, "-m", "attnrobust", "resume", str(out), "-q"], capture_output=True, text=True, check=True
    )
    assert f"{12 - done} rows computed, 12 of 12" in resumed.stderr


def test_the_order_of_shards_does_not_matter(cli: Run, config: Path) -> None:
    out = config.parent / "out"
    cli("run", config, "-q")
    whole = without_times(RunStore.open(out).rows())
    for part in RunStore.open(out).parts():
        part.unlink()
    for shard in ("2/3", "3/3", "1/3"):
        cli("run", config, "-q", "--shard", shard)
    assert without_times(RunStore.open(out).rows()) == whole


def test_launchers_are_heard(cli: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    assert "2 rows computed, 2 of 6" in cli("run", config, "-q").err
