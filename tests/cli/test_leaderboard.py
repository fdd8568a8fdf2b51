"""The command that ranks results."""

import json
from pathlib import Path

import pytest

from attnrobust.cli import ExitCode
from attnrobust.runs.protocol_result import document_text
from tests.cli.test_compare import said_by
from tests.protocol_cases import SMALL, document


def test_table_json_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(document_text(document(name)), encoding="utf-8")
    said = said_by(capsys, "leaderboard", tmp_path, "--out", tmp_path / "page.md")
    assert said.code == ExitCode.OK
    assert "median certified" in said.out
    assert "## standard 9: frobenius" in (tmp_path / "page.md").read_text(encoding="utf-8")
    board = json.loads(said_by(capsys, "leaderboard", tmp_path, "--json").out)
    assert [line["rank"] for line in board["groups"][0]["lines"]] == [1, 1]


def test_refusals_name_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "has no .json" in said_by(capsys, "leaderboard", tmp_path).refusal()
    assert "ends in .md or .html" in said_by(capsys, "leaderboard", tmp_path, "--out", "x.pdf").refusal()
    (tmp_path / "good.json").write_text(document_text(document()), encoding="utf-8")
    (tmp_path / "bad.json").write_text(document_text(document()).replace("0.02", "0.03"), encoding="utf-8")
    assert "bad.json was edited" in said_by(capsys, "leaderboard", tmp_path).refusal()
    other = document(protocol=SMALL.as_dict() | {"version": 10})
    (tmp_path / "bad.json").write_text(document_text(other), encoding="utf-8")
    assert "do not compare" in said_by(capsys, "leaderboard", tmp_path).refusal()
