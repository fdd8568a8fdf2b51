"""Progress: the start is told at once, what is computed inside a row after some silence, and rows pass unchanged."""

import time
from collections.abc import Iterator
from dataclasses import replace

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
    assert second.startswith("  still at work  0001-ab  layer  certificate displacement  0 s")
    assert last.startswith("[1/1] 0001-ab n=3 found")


def test_rows_of_many_places_say_which_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = replace(
        FULL, layer="block:3", threat="any-token", goal="decision", certified_radius=0.10419, status="not_found"
    )
    list(progress.tracked(iter([row]), 1, places=True))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "[1/1] 0001-ab n=3  block:3, any-token, decision  not found  certified 0.1041  attack 0.3"


def test_the_time_that_is_left_is_told_once_it_can_be_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row takes 1000 s, as one that loads a model may; the others take 10 s each."""
    times = iter([1000.0, *(1000.0 + 10.0 * i for i in range(1, 10))])
    monkeypatch.setattr("attnrobust.cli.progress.time.perf_counter", lambda: next(times))
    list(progress.tracked(iter([FULL] * 6), 6))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("about ")[2] for line in lines] == [
        "",
        "",
        "",
        "",
        "7 s left at this pace",
        "5 s left at this pace",
        "",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(31.4, "31 s"), (240.0, "4 min"), (7200.0, "2.0 h")])
def test_times_are_as_coarse_as_the_guess(seconds: float, words: str) -> None:
    assert progress.in_words(seconds) == words


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.tracked(slow_rows(), 1, quiet=True)) == [FULL]
    assert capsys.readouterr().err == ""
    assert not activity._listeners
