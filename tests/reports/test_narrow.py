"""Tables of results on terminals of any width: every line is a line, and the radii stay."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from attnrobust.reports.narrow import fitted
from attnrobust.reports.tables import result_table
from attnrobust.runs.rows import Row
from tests.runs.storage.test_files import FULL
from tests.runs.test_depths import whole

LONG = "A sentence that is much longer than what a narrow terminal can show beside the numbers."


def shown(rows: list[Row], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(result_table(rows, width=width))
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line for line in lines if line.startswith(("│", "┃"))]


def rows_of_both_kinds() -> list[list[Row]]:
    layers = [replace(FULL, input_id=f"{i:04d}-0123abcd", text=LONG, certificate="margin-majorant") for i in range(3)]
    networks = [
        whole(depth, 1.25, 0.0, input_id=f"{i:04d}-0123abcd", text=LONG, label=LONG, attack_label=LONG[::-1])
        for i in range(2)
        for depth in ("embeddings", "block:11")
    ]
    return [layers, networks]


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_every_row_is_one_line_with_its_radii(width: int) -> None:
    for rows in rows_of_both_kinds():
        heading, *lines = shown(rows, width)
        assert len(lines) == len(rows)
        for name in ("input", "certified", "attack", "gap", "status"):
            assert name in heading
        for line, row in zip(lines, rows, strict=True):
            assert row.input_id[:4] in line
            assert "found" in line


def test_where_there_is_room_nothing_changes() -> None:
    for rows in rows_of_both_kinds():
        assert "0123abcd" in shown(rows, 300)[1]
        assert LONG[:20] in shown(rows, 300)[1]


def test_names_that_are_not_of_texts_stay_apart() -> None:
    rows = [replace(FULL, input_id=name, text=LONG) for name in ("scan-front", "scan-back")]
    lines = shown(rows, 80)
    assert "scan-front" in lines[1]
    assert "scan-back" in lines[2]


def test_no_rows_are_no_lines() -> None:
    assert fitted([], [], width=10) == ([], [])
