"""The command that writes one problem for other verifiers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from attnrobust.cli import ExitCode
from tests.cli.test_compare import Run, files
from tests.cli.test_goals import anchors, classifier, cli, encoder, texts

__all__ = ["anchors", "classifier", "cli", "encoder", "files", "texts"]  # fixtures

ASKED = ("--epsilon", "0.1", "--out")


@pytest.fixture
def needs_onnx() -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")


@pytest.mark.usefixtures("needs_onnx")
def test_one_input_of_a_layer_with_a_readout(cli: Run, files: Path, tmp_path: Path) -> None:
    asked = ("export-problem", files / "layer.npz", "--tokens", files / "x.npz", "--readout", files / "readout.npz")
    said = cli(*asked, "--input", 2, *ASKED, tmp_path / "out", "--json")
    assert said.code == ExitCode.OK, said.err
    (told,) = said.rows
    assert (told["n"], told["classes"], told["threat"], told["box"]) == (2, 3, "per-token-linf", "enclosing")
    assert told["about"]["input"] == "x2"
    assert "the readout acts on the output of this attention layer" in told["about"]["scope"]
    assert told == json.loads((tmp_path / "out" / "problem.json").read_text())
    assert "wrote " in said.err
    for name in ("problem.onnx", "problem.vnnlib"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert "--overwrite" in cli(*asked, "--input", 2, *ASKED, tmp_path / "out").refusal()
    again = cli(
        *asked, "--input", 2, *ASKED, tmp_path / "out", "--overwrite", "--threat", "frobenius", "--box", "inscribed"
    )
    assert "sat:   the point is a move within the radius" in again.out
    assert "box inscribed" in again.out


@pytest.mark.usefixtures("needs_onnx")
def test_decisions_and_nearest_anchors_of_whole_models(
    cli: Run, classifier: Path, encoder: Path, texts: Path, anchors: Path, tmp_path: Path
) -> None:
    asked = ("--at", "block:1", "--texts", texts, "--input", 1, "--json", *ASKED)
    (decision,) = cli("export-problem", classifier, "--goal", "decision", *asked, tmp_path / "a").rows
    assert (decision["classes"], decision["about"]["text"]) == (3, "w3 w5 w7")
    nearest = cli("export-problem", encoder, "--goal", "nearest", "--anchors", anchors, *asked, tmp_path / "b").rows
    assert nearest[0]["classes"] == 2
    several = ("--at", "*", "--goal", "decision", "--texts", texts, *ASKED, tmp_path / "c")
    assert "one problem is about one place, not 2" in cli("export-problem", classifier, *several).refusal()
    headless = ("--goal", "decision", "--texts", texts, "--input", 1, *ASKED, tmp_path / "c")
    assert "BertModel has no head of its own" in cli("export-problem", encoder, *headless).refusal()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--readout", "readout.npz"), "the file has 3 inputs and one problem is about one; name it by --input"),
        (("--readout", "readout.npz", "--input", 4), "there is no input 4; the file has 3"),
        (("--tolerance", "10%"), "linear constraints on outputs, no norm of them"),
        (("--readout", "readout.npz", "--input", 1, "--threat", "frobenius"), "box inscribed"),
        (("--readout", "readout.npz", "--input", 1, "--box", "inside"), "unknown box 'inside'"),
        (("--readout", "readout.npz", "--input", 1, "--threat", "wasserstein:2"), "does more than move tokens"),
    ],
)
@pytest.mark.usefixtures("needs_onnx")
def test_what_cannot_be_exported_is_one_line(
    cli: Run, files: Path, tmp_path: Path, options: tuple[object, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    line = cli("export-problem", "layer.npz", "--tokens", "x.npz", *options, *ASKED, tmp_path / "out").refusal()
    assert says in line
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_error_comes_before_the_model(
    cli: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    np.savez(tmp_path / "empty.npz")
    asked = ("--tokens", files / "x.npz", "--readout", files / "readout.npz")
    line = cli("export-problem", tmp_path / "empty.npz", *asked, *ASKED, tmp_path / "out").refusal()
    assert "pip install 'attnrobust[onnx]'" in line
