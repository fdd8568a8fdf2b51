"""Threats on token measures from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnrobust.cli import ExitCode, run
from tests.layer_files import write_layer


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A layer with two heads and one input of three tokens."""
    write_layer(tmp_path, np.random.default_rng(0), scale=0.5, x3=3)
    return tmp_path


def rows_of(capsys: pytest.CaptureFixture[str], files: Path, command: str, *arguments: str) -> list[dict[str, Any]]:
    code = run([command, str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--json", "-q", *arguments])
    assert code in (ExitCode.OK, None)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("threat", ["coupling:inf", "wasserstein:2:within:4.0", "coupling:1:within:4.0"])
def test_certify_takes_balls_of_measures(capsys: pytest.CaptureFixture[str], files: Path, threat: str) -> None:
    (row,) = rows_of(capsys, files, "certify", "--threat", threat, "--tolerance", "0.5")
    assert row["threat"] == threat
    assert row["status"] == "certified"
    assert row["certified_radius"] > 0
    assert set(row["certificates"]) <= {"measure-ball", "measure-local", "measure-curvature", "measure-cluster"}


def test_compare_takes_copies(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    (row,) = rows_of(capsys, files, "compare", "--threat", "copies:1", "--tolerance", "3")
    assert row["threat"] == "copies:1"
    assert row["attack"] == "token-duplication"
    assert row["status"] == "found"
    assert row["gap"] >= 1
    (again,) = rows_of(capsys, files, "certify", "--threat", "frobenius", "--tolerance", "3")
    assert again["problem"] != row["problem"]


def test_an_attack_that_does_not_search_the_threat_is_refused(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    common = ["attack", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--tolerance", "3", "-q"]
    assert run([*common, "--threat", "coupling:inf", "--method", "foolbox:DDN"]) == ExitCode.USAGE
    assert "name 'mass-splitting'" in capsys.readouterr().err
    assert run([*common, "--threat", "copies:1", "--method", "mass-splitting"]) == ExitCode.USAGE
    assert "name 'token-duplication'" in capsys.readouterr().err
    (row,) = rows_of(
        capsys, files, "attack", "--threat", "copies:1", "--tolerance", "3", "--method", "token-duplication"
    )
    assert row["attack"] == "token-duplication"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threat", "wasserstein:2"], "within:R"),
        (["--threat", "coupling:2:within:4.0", "--pool", "row:0"], "coupling:inf"),
    ],
)
def test_what_is_not_sound_says_what_to_do(
    capsys: pytest.CaptureFixture[str], files: Path, arguments: list[str], words: str
) -> None:
    code = run(["certify", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--json", "-q", *arguments])
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert code == ExitCode.OK
    assert row["certified_radius"] == 0.0
    assert row["certificates"] == {}
    assert words in row["message"]


@pytest.mark.parametrize("threat", ["copies:0", "copies:x", "copies:1:loose", "coupling:3", "wasserstein:2:within:-1"])
def test_misspelt_threats_are_refused(capsys: pytest.CaptureFixture[str], files: Path, threat: str) -> None:
    code = run(["certify", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--threat", threat])
    assert code == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnrobust: ")
