"""The command about smoothed decisions."""

from pathlib import Path

from attnrobust.cli import ExitCode
from attnrobust.errors import InputError
from attnrobust.runs.smoothed import SmoothedRow
from tests.cli.test_compare import Run
from tests.cli.test_goals import anchors, classifier, cli, encoder, texts

__all__ = ["anchors", "classifier", "cli", "encoder", "texts"]  # fixtures

ASKED = ("--at", "block:1", "--goal", "decision", "--sigma", "0.05", "--samples", "200", "-q")


def test_rows_of_a_decision(cli: Run, classifier: Path, texts: Path) -> None:
    said = cli("smooth", classifier, *ASKED, "--texts", texts, "--json")
    assert said.code == ExitCode.OK
    for row, count in zip(said.rows, (3, 1), strict=True):
        assert (row["model"], row["layer"], row["n"], row["sigma"]) == ("smoothed", "block:1", count, 0.05)
        assert row["status"] in ("found", "certified", "abstained")
        assert row["certified_radius"] <= (row["attack_radius"] or float("inf"))
        assert row["failure_probability"] == 1e-3
    assert cli("smooth", classifier, *ASKED, "--texts", texts, "--json").rows[0]["share"] == said.rows[0]["share"]


def test_the_table_says_that_it_is_another_model(cli: Run, encoder: Path, texts: Path, anchors: Path) -> None:
    asked = ("--at", "block:1", "--goal", "nearest", "--anchors", anchors, "--sigma", "0.01", "--samples", "100")
    said = cli("smooth", encoder, *asked, "--texts", texts)
    assert said.code == ExitCode.OK
    assert "smoothed sigma=0.01" in said.out
    assert "another model" in said.out
    assert "[2/2]" in said.err


def test_what_is_no_decision_is_refused(cli: Run, classifier: Path, texts: Path) -> None:
    for wrong, cure in (
        (("--at", "block:1", "--goal", "hidden", "--sigma", "1"), "smoothing is about a decision"),
        (("--at", "block:1", "--goal", "decision", "--sigma", "-1"), "sigma must be a positive number"),
        (("--at", "block:9", "--goal", "decision", "--sigma", "1"), "block:1"),
    ):
        said = cli("smooth", classifier, *wrong, "--texts", texts)
        assert said.code == ExitCode.USAGE
        assert cure in said.err


def test_a_row_without_an_answer_is_plain() -> None:
    row = SmoothedRow("x", "block:1", "frobenius", "decision", "error", message=str(InputError("no")))
    plain = {name: value for name, value in vars(row).items() if name != "answer"}
    assert row.as_dict() == plain | {"model": "smoothed"}
    assert (row.certified_radius, row.attack_radius) == (None, None)
