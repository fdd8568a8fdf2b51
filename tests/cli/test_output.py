"""What users wrote is shown as they wrote it, whatever stdout can hold, and no row is lost on the way."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from rich.console import Console

import attnrobust.runs.work
from attnrobust.cli import ExitCode
from attnrobust.cli.compare import _print_tables
from attnrobust.reports.layout import lay_out, words
from attnrobust.runs.rows import Row
from attnrobust.runs.storage.files import REPORT_NAME, rows_digest
from tests.cli.test_compare import Run, Said, said_by
from tests.layer_files import write_layer
from tests.runs.storage.test_files import FULL

MARKUP = ("Say hi. [/INST] Hello!", "[bold]loud[/bold]", "[a-z]+", ":smile: [red]", "[link=x]y", "\\[x]")
FAST = ("--methods", "castin2024-derived", "-q")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Said:
        return said_by(capsys, *arguments)

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A layer with two heads, one input whose name is markup, one with an emoji, and a readout."""
    random = np.random.default_rng(0)
    write_layer(tmp_path, random, x1=3)
    with np.load(tmp_path / "x.npz") as archive:
        x = archive["x1"]
    np.savez(tmp_path / "markup.npz", **{"[/INST]": x, "[bold]": x})
    np.savez(tmp_path / "emoji.npz", **{"\N{GRINNING FACE}": x, "b": x})
    np.savez(tmp_path / "readout.npz", weight=random.normal(size=(3, 6)), bias=np.zeros(3))
    return tmp_path


def process(
    *arguments: object, stdout: int = subprocess.PIPE, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "attnrobust", *map(str, arguments)]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=300, env={**os.environ, **environment}
    )


# ---- markup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MARKUP)
def test_no_text_of_a_table_is_markup(text: str) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(lay_out(words(text, "b"), [(text, "x")], title=f"title {text}", caption=f"caption {text}"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(text) == 4


@pytest.mark.parametrize("text", MARKUP)
def test_texts_of_rows_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], text: str) -> None:
    rows = [replace(FULL, text=text, input_id=f"a{text}"), replace(FULL, text=text, input_id=f"b{text}")]
    _print_tables(rows)
    shown = capsys.readouterr().out
    assert shown.count(text) >= 4


def test_names_of_inputs_and_paths_are_shown_as_they_are(cli: Run, files: Path) -> None:
    shown = cli("compare", files / "layer.npz", "--tokens", files / "markup.npz", *FAST)
    assert shown.code == ExitCode.OK
    assert "[/INST]" in shown.out
    assert "[bold]" in shown.out
    odd = files / "[/x] [red]"
    odd.mkdir(parents=True)
    (files / "layer.npz").rename(odd / "layer.npz")
    shown = cli("bounds", odd / "layer.npz", "--tokens", files / "markup.npz", "--search", 0)
    assert shown.code == ExitCode.OK
    # a long path of temporary files wraps
    assert f"{odd / 'layer.npz'}, attention, [/INST]" in shown.out.replace("\n", "")


def test_tokens_and_layers_of_a_scan_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from attnrobust.cli.scan import _print
    from attnrobust.models.listing import LayerInfo
    from attnrobust.runs.scan import HeadRank, LayerRank, Scan, TokenRank

    ranks = Scan(
        (LayerRank("[/layer]", 1, 0.1, 0.1, 0.1, 0.1, 1.0),),
        (HeadRank("[b]", 0, 1.0, 1.0),),
        (TokenRank("[/INST]", 1, 0.5),),
        (LayerInfo("[red]", "k", supported=False, reason="[green] no"),),
    )
    _print(ranks)
    shown = capsys.readouterr().out
    for part in ("[/layer]", "[b] head 0", "[/INST]", "[red]", "[green] no"):
        assert part in shown


# ---- what stdout cannot hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
@pytest.mark.one_in(2)
def test_a_stdout_that_is_not_utf8_loses_no_row(files: Path, environment: dict[str, str]) -> None:
    asked = ("certify", files / "layer.npz", "--tokens", files / "emoji.npz", *FAST)
    done = process(*asked, "--out", files / "tables", environment=environment)
    assert done.returncode == ExitCode.OK, done.stderr
    assert b"?" in done.stdout
    written = json.loads((files / "tables" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["input_id"] for row in written] == ["b", "\N{GRINNING FACE}"]
    done = process(*asked, "--json", environment=environment)
    assert [json.loads(line)["input_id"] for line in done.stdout.splitlines()] == ["b", "\N{GRINNING FACE}"]


@pytest.mark.parametrize("extra", [(), ("--json",)])
@pytest.mark.one_in(2)
def test_files_are_written_although_the_reader_went_away(files: Path, extra: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    asked = ("certify", files / "layer.npz", "--tokens", files / "emoji.npz", *FAST, "--out", files / "out", *extra)
    done = process(*asked, stdout=writer)
    os.close(writer)
    assert done.returncode == ExitCode.PIPE, done.stderr
    assert b"Error" not in done.stderr
    assert len(json.loads((files / "out" / "results.json").read_text(encoding="utf-8"))["rows"]) == 2


def test_a_broken_pipe_is_not_taken_for_a_threshold(files: Path) -> None:
    for asked in (("list-layers", files / "layer.npz", "--json"), ("list-layers", files / "layer.npz"), ("--help",)):
        reader, writer = os.pipe()
        os.close(reader)
        done = process(*asked, stdout=writer)
        os.close(writer)
        assert done.returncode == ExitCode.PIPE, (asked, done.stderr)
        assert done.stderr == b""


# ---- one directory, one job ------------------------------------------------------------------------------------------


def test_results_of_another_job_are_not_replaced(cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = files / "out"
    asked = ("certify", files / "layer.npz", "--tokens", files / "x.npz", *FAST, "--json", "--out", out)
    assert cli(*asked).code == ExitCode.OK
    assert cli("report", out).code == ExitCode.OK
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (files / "x.npz").rename(files / "y.npz")  # the same content under another name is the same job
    asked = ("certify", files / "layer.npz", "--tokens", files / "y.npz", *FAST, "--json", "--out", out)
    assert cli(*asked).code == ExitCode.OK
    assert (out / REPORT_NAME).read_bytes() == before[REPORT_NAME]
    with monkeypatch.context() as patch:
        patch.setattr(attnrobust.runs.work, "evaluate_row", lambda *_: pytest.fail("worked before it looked"))
        line = cli(*asked, "--tolerance", "1%").refusal()
        assert "holds results of another job; choose another --out, or replace them by --overwrite" in line
    said = cli(*asked, "--tolerance", "1%", "--overwrite")
    assert said.code == ExitCode.OK
    assert not (out / REPORT_NAME).exists()  # it showed other rows
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"] == said.rows


def test_results_and_runs_keep_to_their_directories(cli: Run, files: Path) -> None:
    asked = ("--tokens", files / "x.npz", *FAST)
    assert cli("certify", files / "layer.npz", *asked, "--out", files / "one").code == ExitCode.OK
    assert cli("run", "--model", files / "layer.npz", *asked, "--out", files / "many").code == ExitCode.OK
    line = cli("run", "--model", files / "layer.npz", *asked, "--out", files / "one").refusal()
    assert "holds results of one command" in line
    line = cli("certify", files / "layer.npz", *asked, "--out", files / "many").refusal()
    assert "holds a run of many rows" in line


def test_a_report_of_other_rows_is_told(cli: Run, files: Path) -> None:
    from attnrobust.runs.storage.store import RunStore

    out = files / "out"
    cli("run", "--model", files / "layer.npz", "--tokens", files / "markup.npz", *FAST, "--out", out, "--shard", "1/2")
    cli("report", out)
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    assert "Incomplete: 1 of 2 rows are not computed yet." in page
    assert rows_digest(RunStore.open(out).rows()) in page
    assert "shows other rows" not in cli("check", out, "--min-certified", 0).err
    cli("resume", out, "-q")
    assert "shows other rows; make it again by attnrobust report" in cli("check", out, "--min-certified", 0).err
    cli("report", out)
    assert "Incomplete" not in (out / REPORT_NAME).read_text(encoding="utf-8")
    assert cli("check", out, "--min-certified", 0).err.splitlines() == [
        "attnrobust: passed: 0 of 2 rows fall short, 0 may"
    ]


# ---- before the first row --------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_before_the_first_row(
    cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnrobust.runs.work, "evaluate_row", lambda *_: pytest.fail("worked before it looked"))
    asked = (files / "layer.npz", "--tokens", files / "x.npz")
    for command in ("certify", "attack", "compare", "bounds"):
        assert "--seed" in cli(command, *asked, "--seed", 2**63).refusal()
    assert "--seed" in cli("run", "--model", *asked, "--seed", 2**63).refusal()
    (files / "out" / "results.json").mkdir(parents=True)
    assert "it is a directory; choose another --out" in cli("certify", *asked, "--out", files / "out").refusal()


def test_an_export_that_cannot_be_written_writes_nothing(cli: Run, files: Path) -> None:
    out = files / "out"
    cli("run", "--model", files / "layer.npz", "--tokens", files / "x.npz", *FAST, "--out", out)
    line = cli("export", out, "--csv", files / "rows.csv", "--jsonl", files / "absent" / "rows.jsonl").refusal()
    assert "make it or choose another --jsonl" in line
    assert not (files / "rows.csv").exists()
    assert "--junit" in cli("check", out, "--min-certified", 0, "--junit", files).refusal()


# ---- what a margin is about ------------------------------------------------------------------------------------------


def test_every_surface_says_what_a_readout_is_about(cli: Run, files: Path) -> None:
    scope = "the readout acts on the output of this attention layer; it is not the decision of the model"
    asked: tuple[object, ...] = ("certify", files / "layer.npz", "--tokens", files / "x.npz", "-q")
    asked += ("--methods", "margin-majorant", "--readout", files / "readout.npz")
    out = files / "out"
    said = cli(*asked, "--out", out)
    assert scope in " ".join(said.out.split())
    (row,) = cli(*asked, "--json").rows
    assert row["goal_scope"] == scope
    cli("report", out)
    assert scope in (out / REPORT_NAME).read_text(encoding="utf-8")
    assert scope in cli("check", out, "--min-certified", 0).err
    (row,) = cli("certify", files / "layer.npz", "--tokens", files / "x.npz", *FAST, "--json").rows
    assert row["goal_scope"] is None


def test_a_certificate_that_needs_an_extra_is_named_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    cure = "python-flint is not installed; install the extra: pip install 'attnrobust[rigorous]'"
    rows: list[Row] = [replace(FULL, skipped={"rigorous-local": cure, "other": "needs a margin"})]
    _print_tables(rows)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"without rigorous-local: {cure}" in shown
    assert "needs a margin" not in shown
