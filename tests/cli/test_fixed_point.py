"""The command fixed-point: what is proved, where the stack ends, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from attnrobust.cli import ExitCode, run

ARGUMENTS = ["fixed-point", "layer.npz"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One head of width 1 with a small value weight: ``f(x) = 0.1 E x + 1``, so the fixed point is 1/0.9."""
    one = np.ones((1, 1, 1))
    np.savez(tmp_path / "layer.npz", w_q=0.1 * one, w_k=one, w_v=0.1 * one, b_o=np.ones(1))
    np.savez(tmp_path / "wild.npz", w_q=one, w_k=one, w_v=3.0 * one)
    np.savez(tmp_path / "x.npz", a=np.array([[0.5], [-2.0]]), b=np.array([[1.0], [0.0], [2.0]]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("order", ["1", "2", "inf"])
def test_every_input_ends_at_the_same_token(capsys: pytest.CaptureFixture[str], order: str) -> None:
    assert run([*ARGUMENTS, "--tokens", "x.npz", "--order", order, "--json"]) == ExitCode.OK
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["input"], second["input"], first["radius"]) == ("a", "b", 2.0)
    for row in (first, second):
        assert row["proved"]
        assert row["rate"] < 1
        assert row["fixed_point"]["reached"]
        assert row["fixed_point"]["error"] <= row["tolerance"]
        assert row["fixed_point"]["token"][0] == pytest.approx(1 / 0.9, abs=1e-8)
        assert row["fixed_point"]["measured_rate"] <= row["rate"]


@pytest.mark.usefixtures("files")
def test_without_inputs_it_says_what_is_proved(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--radius", "2"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "a contraction" in out
    assert "W_2 on the ball of radius 2" in out


@pytest.mark.usefixtures("files")
def test_a_layer_without_a_proof_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fixed-point", "wild.npz", "--tokens", "x.npz"]) == ExitCode.OK
    assert "no contraction is proved" in capsys.readouterr().out
    assert run(["fixed-point", "wild.npz", "--radius", "1e3", "--json"]) == ExitCode.OK
    row = json.loads(capsys.readouterr().out)
    assert (row["proved"], row["rate"], row["layers_needed"], row["fixed_point"]) == (False, None, None, None)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--radius R alone"),
        (["--radius", "0"], "radius must be a positive number; got 0.0"),
        (["--radius", "2", "--order", "3"], "order 3.0 is not supported; give 1, 2 or infinity"),
        (["--tokens", "x.npz", "--radius", "1.5"], "outside of the ball"),
        (["--radius", "2", "--tolerance", "0"], "tolerance must be > 0"),
        (["--radius", "2", "--layer", "attentoin"], "nearest: attention"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert run([*ARGUMENTS, *arguments]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("command", ["fixed-point", "bounds"])
def test_data_sets_are_read_and_their_columns_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "x.csv").write_text("sentense,label\nA storm.,1\n")
    assert run([command, "layer.npz", "--dataset", "x.csv", "--column", "sentence"]) == ExitCode.USAGE
    assert "nearest: sentense" in capsys.readouterr().err
    assert run([command, "layer.npz", "--dataset", "x.csv", "--column", "sentense"]) == ExitCode.USAGE
    assert "weights" in capsys.readouterr().err
    assert run([command, "layer.npz", "--tokens", "x.npz", "--column", "text"]) == ExitCode.USAGE
    assert "--column names a column of --dataset" in capsys.readouterr().err
