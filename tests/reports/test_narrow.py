"""Tables of results on terminals of any width: every line is a line, and the radii stay."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from attnrobust.reports.layout import FittingTable, lay_out, shrunk, words
from attnrobust.reports.tables import certificate_table, result_table, summary_table
from attnrobust.runs.rows import Row
from tests.runs.storage.test_files import FULL
from tests.runs.test_depths import whole

LONG = "A sentence that is much longer than what a narrow terminal can show beside the numbers."


def shown(rows: list[Row], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(result_table(rows))
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


def printed(table: FittingTable, width: int, *, colour: bool) -> str:
    """What a terminal of this width shows, its colours taken off."""
    console = Console(width=width, file=io.StringIO(), force_terminal=colour, color_system="truecolor")
    console.print(table)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]


LAYERS = ("encoder.layer.11.attention.self", "encoder.layer.2.attention.self")
NUMBERS = ("1234567", "0.0001235", "7.891e-09")


def summarised() -> list[Row]:
    return [
        replace(
            FULL, input_id=f"{i:04d}-0123abcd", layer=layer, goal="displacement <= 10% of the clean output's norm",
            certified_radius=0.00012345, attack_radius=0.25, gap=2025.1,
        )
        for i, layer in enumerate(LAYERS)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("colour", [False, True])
def test_no_number_loses_a_digit_and_no_name_is_cut(width: int, colour: bool) -> None:
    text = printed(summary_table(summarised()), width, colour=colour)
    assert max(map(len, text.splitlines())) <= width
    for word in (*LAYERS, "0.0001234", "0.25", "2026", "displacement"):
        assert word in text


@pytest.mark.parametrize("width", [60, 80])
def test_many_columns_become_blocks(width: int) -> None:
    table = lay_out(words(*"abcdefgh"), [[LAYERS[0], *NUMBERS, *NUMBERS, LAYERS[1]]])
    text = printed(table, width, colour=False)
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" not in text
    assert max(map(len, text.splitlines())) <= width
    assert all(f"{name}: {value}" in text for name, value in zip("bcd", NUMBERS, strict=True))


def test_certificates_of_eight_inputs_fit() -> None:
    rows = [replace(row, input_id=f"{i:04d}-x") for i, row in enumerate([FULL] * 8)]
    table = certificate_table(rows)
    assert table is not None
    assert max(map(len, printed(table, 60, colour=False).splitlines())) <= 60


def test_the_widest_column_gives_way() -> None:
    assert shrunk([10, 4], [3, 4], 9) == [5, 4]
    assert shrunk([10, 4], [3, 4], 6) is None
    assert shrunk([2], [1], 5) == [2]
