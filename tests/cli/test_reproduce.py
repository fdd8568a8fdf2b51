"""The command reproduce: list, files, exit codes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.reproduce import registry
from attnrobust.reproduce.experiments import kim2021_lipschitz


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the counterexample of ``kim2021-lipschitz``, and the same with its bound and its finding exchanged."""

    def parts(setting: object) -> list[object]:
        return [p for p in kim2021_lipschitz.parts(setting) if p.name == "second-power"]  # type: ignore[arg-type]

    plain = replace(
        kim2021_lipschitz.EXPERIMENT,
        parts=parts,  # type: ignore[arg-type]
        verdicts=lambda _: [],
        panels=lambda rows: kim2021_lipschitz.panels(rows)[1:2],
    )
    wrong = replace(plain, name="wrong", sides=(("upper", "found"),))
    monkeypatch.setattr(registry, "EXPERIMENTS", (plain, wrong))


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "--list", "--json"]) == ExitCode.OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) >= 8
    assert all(row["paper"] and row["statement"] and row["minutes"] < row["minutes_full"] for row in rows)
    assert run(["reproduce", "--list"]) == ExitCode.OK
    assert "vuckovic2020" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_files_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "kim2021-lipschitz", "--out", str(tmp_path / "a"), "-q", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["experiment"] == "kim2021-lipschitz"
    assert run(["reproduce", "kim2021-lipschitz", "--out", str(tmp_path / "a"), "-q"]) == ExitCode.OK
    assert (tmp_path / "a" / "figure.svg").exists()
    capsys.readouterr()
    assert run(["reproduce", "wrong", "--out", str(tmp_path / "b"), "-q"]) == ExitCode.UNSOUND
    assert "UNSOUND" in capsys.readouterr().err
    assert (tmp_path / "b" / "manifest.json").exists()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce"]) == ExitCode.USAGE
    assert "--list" in capsys.readouterr().err
    assert run(["reproduce", "castin2024-grwoth"]) == ExitCode.USAGE
    assert "castin2024-growth" in capsys.readouterr().err
