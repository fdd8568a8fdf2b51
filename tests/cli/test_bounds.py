"""The command bounds: strict JSON, a table that names every bound, errors of one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from attnrobust.cli import ExitCode, run
from tests.layer_files import write_layer

ROUNDING = 1e-9


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_layer(tmp_path, np.random.default_rng(0), a=2, b=3)
    return tmp_path


def test_json_is_one_strict_object_an_input(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["bounds", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--json", "--search", "0"])
    assert code == ExitCode.OK
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["input"], second["input"], second["n"]) == ("a", "b", 3)
    assert first["layer_name"] == "attention"
    assert all(row["ratio"] is None or row["ratio"] >= 1 - ROUNDING for row in first["bounds"])
    assert {"name", "quantity", "region", "conditions", "reference", "kind", "value", "ratio"} <= set(
        first["bounds"][0]
    )


def test_the_table_names_every_bound(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bounds", str(files / "layer.npz"), "--radius", "1", "--n", "3", "--search", "0"]) == ExitCode.OK
    out = capsys.readouterr().out
    for words in ("castin2024-reported", "reached", "do not apply", "kim2021-l2", "float64", "R = 1", "every mask"):
        assert words in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("/")) < 100


def test_the_table_of_an_input_has_less_than_a_hundred_columns(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["bounds", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--search", "0"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert any("change per size around X" in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith("/")) < 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "attentoin", "--radius", "1", "--n", "3"], "nearest: attention"),
        (["--radius", "0", "--n", "3"], "radius must be a positive number"),
        (["--radius", "1"], "together with --n"),
        (["--tokens", "x.npz", "--n", "3"], "leave --n out"),
        (["--tokens", "x.npz", "--epsilon", "0"], "epsilon must be a positive number"),
        (["--tokens", "x.npz", "--threat", "frobenus"], "nearest: frobenius"),
    ],
)
def test_errors_are_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(files)
    assert run(["bounds", "layer.npz", *arguments]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
