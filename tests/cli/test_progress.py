"""Progress: the start is told at once, what is computed inside a row after some silence, and rows pass unchanged."""

import time
from collections.abc import Iterator

import pytest

from attnrobust.cli import progress
from attnrobust.runs import activity
from attnrobust.runs.rows import Row
from tests.runs.storage.test_files import FULL


def slow_rows() -> Iterator[Row]:
    activity.now("0001-ab", "layer", "certificate displacement")
    time.sleep(0.1)
    yield FULL


def test_the_start_and_what_is_inside_a_row_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.02)
    assert list(progress.tracked(slow_rows(), 1)) == [FULL]
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first == "[0/1] begins"
    assert second.startswith("  still at work  0001-ab  certificate displacement  0 s")
    assert last.startswith("[1/1] 0001-ab n=3 found")


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.tracked(slow_rows(), 1, quiet=True)) == [FULL]
    assert capsys.readouterr().err == ""
    assert not activity._listeners
