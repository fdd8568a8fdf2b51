"""Certified accuracy: shares sum to one, each side counts what it may, groups stay apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.errors import InputError
from attnrobust.figure import png
from attnrobust.reports.curve import curves
from attnrobust.reports.plots import curve_plot
from attnrobust.runs.storage.files import write_results
from tests.runs.storage.test_files import EMPTY, FULL

ROWS = [
    replace(FULL, input_id="a", certified_radius=0.1, attack_radius=0.3),
    replace(FULL, input_id="b", certified_radius=0.2, attack_radius=None, status="not_found"),
    replace(FULL, input_id="c", certified_radius=0.0, attack_radius=0.0, status="misclassified"),
    replace(FULL, input_id="d", certified_radius=None, attack_radius=None, status="error"),
]


def test_every_input_is_counted_once_on_the_side_that_is_known() -> None:
    (curve,) = curves(ROWS, epsilons=[0.0, 0.1, 0.15, 0.3])
    assert [(p.certified, p.undecided, p.broken) for p in curve.points] == [
        (0.5, 0.25, 0.25),
        (0.5, 0.25, 0.25),
        (0.25, 0.5, 0.25),
        (0.0, 0.5, 0.5),
    ]


def test_nothing_is_pooled() -> None:
    other = [replace(row, threat="any-token") for row in ROWS] + [replace(ROWS[0], goal="decision")]
    assert [(c.threat, c.goal, c.inputs) for c in curves([*ROWS, *other])] == [
        ("frobenius", "displacement 10%", 4),
        ("any-token", "displacement 10%", 4),
        ("frobenius", "decision", 1),
    ]


def test_sizes_are_found_and_checked() -> None:
    assert [p.epsilon for p in curves([EMPTY])[0].points] == [0.0]
    found = [p.epsilon for p in curves(ROWS)[0].points]
    assert (found[0], found[1], found[-1]) == (0.0, 0.1, 0.3)
    with pytest.raises(InputError, match="number >= 0"):
        curves(ROWS, epsilons=[-1.0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, ROWS, run={"model": "m"}, job="j")
    assert run(["curve", str(tmp_path), "--epsilons", "0.1,0.3", "--out", str(tmp_path / "curve.png")]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "50.0%" in out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run(["curve", str(tmp_path), "--epsilons", "0.1,0.3", "--json"]) == ExitCode.OK
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["points"][1] == {"epsilon": 0.3, "certified": 0.0, "broken": 0.5, "undecided": 0.5}


def test_rows_without_radii_make_a_plot() -> None:
    assert png(*curve_plot([EMPTY])).startswith(b"\x89PNG")
