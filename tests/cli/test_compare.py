"""The command line: exit codes, one-line errors, JSON on stdout, files."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnrobust.runs.evaluate
import attnrobust.runs.work
from attnrobust.cli import ExitCode, run
from attnrobust.cli.exits import exit_code, guarded
from attnrobust.runs.rows import Row, row_from_dict
from attnrobust.runs.storage.files import write_results
from attnrobust.runs.storage.parquet import read_parquet
from attnrobust.runs.yardsticks import as_json
from tests.layer_files import write_layer
from tests.runs.storage.test_files import FULL
from tests.test_comparison import found, report


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    def refusal(self) -> str:
        """The one line on stderr of a refused command."""
        assert self.code == ExitCode.USAGE, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("attnrobust: ")
        return line


Run = Callable[..., Said]


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    code = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return Said(code, captured.out, captured.err)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Said:
        return said_by(capsys, *arguments)

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A layer with two heads, three inputs and a readout."""
    random = np.random.default_rng(0)
    write_layer(tmp_path, random, x1=1, x2=2, x10=10)
    np.savez(tmp_path / "readout.npz", weight=random.normal(size=(3, 6)), bias=np.zeros(3))
    return tmp_path


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put fixed radii in the place of certificates and attacks."""

    def pretend(certified: float, attacked: float) -> None:
        monkeypatch.setattr(attnrobust.runs.evaluate, "certify_row", lambda p, *_: report(p, certified))
        monkeypatch.setattr(attnrobust.runs.evaluate, "run_attack", lambda p, **_: found(p, attacked))

    return pretend


# ---- results ---------------------------------------------------------------------------------------------------------


def test_compare_prints_one_object_a_row(cli: Run, files: Path) -> None:
    said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "--seed", 4)
    assert said.code == ExitCode.OK
    assert [row["input_id"] for row in said.rows] == ["x1", "x2", "x10"]
    for row in said.rows:
        assert row["status"] == "found"
        assert row["seed"] == 4
        assert row["layer"] == "attention"
        assert row["goal"] == "displacement 10%"
        assert row["certified_radius"] <= row["attack_radius"]
        assert as_json(row_from_dict(row)) == row
    assert [line[:3] for line in said.err.splitlines() if line[0] == "["] == [
        "[0/",
        "[1/",
        "[2/",
        "[3/",
    ]  # not on stdout


def test_runs_repeat(cli: Run, files: Path) -> None:
    def radii() -> list[tuple[float, float]]:
        said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q")
        return [(row["certified_radius"], row["attack_radius"]) for row in said.rows]

    assert radii() == radii()


def test_tables_for_people(cli: Run, files: Path) -> None:
    said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--quiet")
    assert said.code == ExitCode.OK
    for part in ("x10", "tolerance", "certified", "attack", "gap", "found"):
        assert part in said.out
    assert said.err == ""


def test_certify_does_not_attack_and_attack_does_not_certify(
    cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("not asked for")

    with monkeypatch.context() as patch:
        patch.setattr(attnrobust.runs.evaluate, "run_attack", never)
        certified = cli("certify", files / "layer.npz", "--tokens", files / "x.npz", "--json").rows
    assert {row["status"] for row in certified} == {"certified"}
    assert {row["attack"] for row in certified} == {None}
    monkeypatch.setattr(attnrobust.runs.evaluate, "certify_row", never)
    attacked = cli("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json").rows
    assert {row["status"] for row in attacked} == {"found"}
    assert {row["certified_radius"] for row in attacked} == {None}


def test_out_holds_the_rows_and_the_plot(cli: Run, files: Path) -> None:
    out = files / "out"
    said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "--out", out)
    assert {p.name for p in out.iterdir()} == {"results.parquet", "results.json", "gap.png"}
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert document["rows"] == said.rows
    assert document["run"]["threat"] == "frobenius"
    assert [as_json(row) for row in read_parquet(out / "results.parquet")] == said.rows


def test_readout_gives_margins(cli: Run, files: Path) -> None:
    arguments = (
        "attack",
        files / "layer.npz",
        "--tokens",
        files / "x.npz",
        "--json",
        "--readout",
        files / "readout.npz",
    )
    for row in cli(*arguments).rows:
        assert row["margin"] > 0
        assert row["tolerance"] is None
        assert row["goal"] == "margin mean"
    labelled = cli(*arguments, "--pool", "row:0", "--label", 1).rows
    assert {row["status"] for row in labelled} <= {"found", "misclassified"}
    for row in labelled:
        assert row["goal"] == "margin row:0 label:1"
        assert (row["attack_radius"] == 0) == (row["status"] == "misclassified")


def test_threats_and_tolerances_reach_the_rows(cli: Run, files: Path) -> None:
    common = ("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q")
    for row in cli(*common, "--threat", "per-token", "--tolerance", "0.25", "--pool", "mean").rows:
        assert row["threat"] == "per-token"
        assert row["tolerance"] == 0.25
        assert row["goal"] == "displacement 0.25 mean"


def test_a_fixed_budget_reports_its_use(cli: Run, files: Path) -> None:
    said = cli("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json", "--epsilon", "1e-3")
    for row in said.rows:
        assert row["status"] == "not_found"
        assert row["attack_radius"] is None
        assert row["epsilon"] == 1e-3
        assert 0 < row["usage"] < 1


def test_list_layers(cli: Run, files: Path) -> None:
    said = cli("list-layers", files / "layer.npz", "--json")
    (layer,) = said.rows
    assert layer["name"] == "attention"
    assert (layer["heads"], layer["d"], layer["mask"], layer["supported"]) == (2, 4, "none", True)
    assert "1 of 1 supported" in cli("list-layers", files / "layer.npz").out


# ---- exit codes ------------------------------------------------------------------------------------------------------


def test_fail_under(cli: Run, files: Path, compared: Callable[..., None]) -> None:
    compared(certified=0.1, attacked=0.3)
    common = ("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q", "--fail-under")
    assert cli(*common, 0.1).code == ExitCode.OK
    said = cli(*common, 0.2)
    assert said.code == ExitCode.BELOW
    assert "3 of 3 rows are below --fail-under 0.2, first x1" in said.err
    assert len(said.rows) == 3


def test_fail_under_of_an_attack_is_about_its_radius(cli: Run, files: Path, compared: Callable[..., None]) -> None:
    compared(certified=0.1, attacked=0.3)
    common = ("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q", "--fail-under")
    assert cli(*common, 0.3).code == ExitCode.OK
    assert cli(*common, 0.31).code == ExitCode.BELOW


def test_unsound_rows_are_written_and_exit_with_three(cli: Run, files: Path, compared: Callable[..., None]) -> None:
    compared(certified=0.4, attacked=0.3)
    out = files / "out"
    said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "--out", out, "--fail-under", 9)
    assert said.code == ExitCode.UNSOUND
    assert [row["status"] for row in said.rows] == ["unsound"] * 3
    assert [row.status for row in read_parquet(out / "results.parquet")] == ["unsound"] * 3
    assert said.err.count("UNSOUND on problem") == 3


def test_one_bad_row_does_not_stop_the_others(cli: Run, files: Path) -> None:
    said = cli("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q", "--threat", "token:5")
    assert said.code == ExitCode.OK
    assert [row["status"] for row in said.rows] == ["error", "error", "found"]
    assert "x1: token 5 does not exist" in said.err


def test_a_row_with_an_error_is_below_every_threshold(cli: Run, files: Path) -> None:
    arguments = ("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q", "--threat", "token:5")
    assert cli(*arguments, "--fail-under", 0).code == ExitCode.BELOW


def test_nothing_but_errors_is_an_input_error(cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = lambda task, _: Row(task.input_id, "l", 1, "t", "g", status="error", message="m")  # noqa: E731
    monkeypatch.setattr(attnrobust.runs.work, "evaluate_row", failed)
    said = cli("attack", files / "layer.npz", "--tokens", files / "x.npz", "--json")
    assert said.code == ExitCode.USAGE
    assert len(said.rows) == 3


def test_a_threat_that_no_input_is_long_enough_for_is_refused_once(cli: Run, files: Path) -> None:
    for command in ("attack", "certify", "compare"):
        line = cli(command, files / "layer.npz", "--tokens", files / "x.npz", "--threat", "token:50").refusal()
        assert "no input is long enough for the threat token:50: the longest has 10 tokens" in line


def row(status: str, **values: Any) -> Row:
    return Row("x", "l", 1, "frobenius", "g", status=status, **values)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], ExitCode.OK),
        ([row("found", certified_radius=1.0)], ExitCode.OK),
        ([row("found", certified_radius=0.4, attack_radius=2.0)], ExitCode.BELOW),
        ([row("misclassified", certified_radius=0.0)], ExitCode.BELOW),
        ([row("not_found")], ExitCode.OK),
        ([row("error"), row("found", certified_radius=1.0)], ExitCode.BELOW),
        ([row("error"), row("unsound", certified_radius=1.0)], ExitCode.UNSOUND),
        ([row("error"), row("error")], ExitCode.USAGE),
    ],
)
def test_exit_codes(rows: list[Row], expected: ExitCode) -> None:
    assert exit_code(rows, fail_under=0.5) is expected


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--threat", "frobenious"), "unknown threat 'frobenious'; nearest: frobenius"),
        (("--threat", "token:x"), "give token indices"),
        (("--tolerance", "0"), "tolerance must be a positive number"),
        (("--tolerance", "-1%"), "tolerance must be a positive number"),
        (("--tolerance", "nan"), "such as 1%"),
        (("--tolerance", "ten"), "such as 1%"),
        (("--pool", "median"), "give all, mean or row:I"),
        (("--label", "1"), "give --readout FILE"),
        (("--methods", "castinn"), "unknown certificate 'castinn'"),
        (("--methods", ","), "names no certificate"),
        (("--method", "token-movin"), "unknown attack 'token-movin'; nearest: token-moving"),
        (("--layer", "encoder"), "unknown layer 'encoder'; nearest: attention"),
        (("--fail-under", "-1"), "must be a number >= 0"),
        (("--texts", "x.txt"), "exactly one of --texts, --images, --tokens and --dataset"),
        (("--device", "gpu"), "device 'gpu' is not there"),
        (("--tolerence", "1%"), "--tolerance"),
        (("--seed", "one"), "--seed"),
    ],
)
def test_wrong_options_are_one_line_with_the_cure(cli: Run, files: Path, changed: tuple[str, ...], says: str) -> None:
    line = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", *changed).refusal()
    assert says in line


def test_wrong_files_are_one_line_with_the_cure(cli: Run, files: Path) -> None:
    layer, tokens = files / "layer.npz", files / "x.npz"
    np.savez(files / "wide.npz", a=np.zeros((3, 5)))
    np.savez(files / "nan.npz", a=np.full((3, 4), np.nan))
    np.savez(files / "empty.npz", a=np.zeros((0, 4)))
    np.savez(files / "typo.npz", weights=np.zeros((3, 6)))
    (files / "broken.npz").write_bytes(b"PK")
    assert "exactly one of" in cli("compare", layer).refusal()
    assert "takes 4" in cli("compare", layer, "--tokens", files / "wide.npz").refusal()
    assert "NaN" in cli("compare", layer, "--tokens", files / "nan.npz").refusal()
    assert "n, d >= 1" in cli("compare", layer, "--tokens", files / "empty.npz").refusal()
    assert "broken.npz" in cli("compare", layer, "--tokens", files / "broken.npz").refusal()
    assert "there is no file" in cli("compare", files / "absent.npz", "--tokens", tokens).refusal()
    (files / "x.txt").write_text("One sentence.\n", encoding="utf-8")
    assert "no tokenizer" in cli("compare", layer, "--texts", files / "x.txt").refusal()
    assert "nearest: weight" in cli("compare", layer, "--tokens", tokens, "--readout", files / "typo.npz").refusal()
    both = ("--readout", files / "readout.npz", "--tolerance", "1%")
    assert "exclude each other" in cli("compare", layer, "--tokens", tokens, *both).refusal()


def test_an_unwritable_directory_is_refused_before_the_work(
    cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnrobust.runs.work, "evaluate_row", lambda *_: pytest.fail("worked before it looked"))
    (files / "file").write_text("x", encoding="utf-8")
    line = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--out", files / "file").refusal()
    assert "choose another --out" in line


def test_nothing_is_written_when_a_run_ends_early(cli: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(attnrobust.runs.work, "evaluate_row", interrupt)
    said = cli("compare", files / "layer.npz", "--tokens", files / "x.npz", "--out", files / "out")
    assert said.code == ExitCode.INTERRUPTED
    assert not (files / "out").exists()


def test_a_crash_is_not_taken_for_a_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> int:
        raise ZeroDivisionError("unforeseen")

    assert guarded(crash) == ExitCode.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_verbose_shows_where_a_row_failed(files: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "attnrobust",
        "-v",
        "attack",
        str(files / "layer.npz"),
        "--tokens",
        str(files / "x.npz"),
    ]
    done = subprocess.run([*command, "--threat", "token:5"], capture_output=True, text=True, check=True)
    assert "Traceback" in done.stderr


def test_a_bare_command_shows_the_help(cli: Run) -> None:
    said = cli()
    assert said.code == ExitCode.USAGE
    assert "list-layers" in said.out + said.err


def test_help_explains_the_exit_codes(cli: Run) -> None:
    said = cli("--help")
    assert said.code == ExitCode.OK
    assert "UNSOUND" in said.out


def test_version(cli: Run) -> None:
    assert cli("--version").out == f"attnrobust {attnrobust.__version__}\n"


# ---- the process -----------------------------------------------------------------------------------------------------


def test_what_computes_nothing_loads_nothing_heavy(files: Path) -> None:
    """Help, version, wrong usage, a configuration, the verdict on a finished run: none needs torch."""
    done = [replace(FULL, input_id="x1"), replace(FULL, input_id="x2")]
    write_results(files / "done", done, run={"model": "m"}, job="j")
    commands = [
        ["--help"],
        ["--version"],
        [],
        ["compare"],
        ["compare", "m", "--seed", "9999999999999999999"],
        ["attack", "m", "--tolerence", "1%"],
        *([name, "--help"] for name in ("certify", "compare", "run", "scan", "bounds", "bench", "report", "demo")),
        [
            "config",
            "--model",
            "m",
            "--tokens",
            "x.npz",
            "--tolerance",
            "1%",
            "--methods",
            "displacement,margin-majorant",
        ],
        ["config", "--model", "m", "--tokens", "x.npz", "--threat", "tokens:1,2", "--tolerance", "much"],
        ["check", str(files / "done"), "--min-certified", "0.01"],
    ]
    heavy = ("torch", "transformers", "matplotlib", "cvxpy", "foolbox", "ot", "jinja2", "ray")
    program = f"""
import sys
from attnrobust.cli import run
for command in {commands}:
    code = run(command)
    loaded = [name for name in {heavy} if name in sys.modules]
    assert loaded == [], (command, loaded)
    print("code", code)
"""
    run_once = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run_once.returncode == 0, run_once.stderr
    codes = [line for line in run_once.stdout.splitlines() if line.startswith("code ")]
    assert codes == [f"code {code}" for code in (0, 0, *(2,) * 4, *(0,) * 8, 0, 2, 0)]


def test_the_exit_code_reaches_the_shell(files: Path) -> None:
    command = [sys.executable, "-m", "attnrobust", "list-layers", str(files / "absent.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"attnrobust: there is no file {files / 'absent.npz'}"]


def test_torch_weights_file(cli: Run, files: Path) -> None:
    """The other file format is read too."""
    from safetensors.torch import save_file

    save_file({n: torch.randn(1, 4, 2) for n in ("w_q", "w_k", "w_v")}, files / "layer.safetensors")
    save_file({"a": torch.randn(3, 4)}, files / "x.safetensors")
    said = cli("attack", files / "layer.safetensors", "--tokens", files / "x.safetensors", "--json")
    assert said.code == ExitCode.OK
    assert said.rows[0]["input_id"] == "a"


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(cli: Run, files: Path) -> None:
    for goal in (("--tolerance", "1%"), ("--readout", files / "readout.npz")):
        common = ("compare", files / "layer.npz", "--tokens", files / "x.npz", "--json", "-q", *goal, "--device")
        here, there = cli(*common, "cpu").rows, cli(*common, "cuda").rows
        for one, other in zip(here, there, strict=True):
            assert one["problem"] == other["problem"]
            assert other["certified_radius"] == pytest.approx(
                one["certified_radius"], rel=2e-3
            )  # the search's tolerance
            assert other["attack_radius"] == pytest.approx(one["attack_radius"], rel=0.05)  # another path of the search
