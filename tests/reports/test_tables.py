"""Tables and plots: what a reader is shown is what the rows say."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from attnrobust.models.listing import LayerInfo
from attnrobust.reports.plots import MANY_INPUTS, gap_plot
from attnrobust.reports.tables import MOST_COLUMNS, certificate_table, layer_table, result_table, summary_table
from attnrobust.runs.rows import CertificateEntry, Row
from attnrobust.text import exactly, natural_order, rounded, shortened, shown, shown_bound
from tests.runs.storage.test_files import EMPTY, FULL

PNG = b"\x89PNG\r\n\x1a\n"


def text(table: Table | None) -> str:
    assert table is not None
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows(count: int) -> list[Row]:
    return [replace(FULL, input_id=f"{i:04d}-ab", attack_radius=0.3 + i / 100, gap=3.0 + i / 10) for i in range(count)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (1e-9, "1e-09"),
        (12345.6, "12350"),
        (-12345.6, "-12350"),
        (1.5e6, "1.5e+06"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_for_people(value: float | None, expected: str) -> None:
    assert shown(value) == expected


def test_a_line_of_the_result_table() -> None:
    line = next(line for line in text(result_table([FULL])).splitlines() if "0001-ab" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["0001-ab", "naïve café — 猫", "3", "0.5", "0.1", "b", "0.3", "3", "found", "0.30"]


def test_nothing_certified_is_a_dash_and_no_radius() -> None:
    nothing = replace(FULL, certificates={}, certificate=None, certificate_kind=None, certified_radius=0.0, gap=None)
    for row, shown_radius in ((nothing, "-"), (replace(nothing, status="misclassified"), "0")):
        line = next(line for line in text(result_table([row, FULL])).splitlines() if "0001-ab" in line)
        assert [cell.strip() for cell in line.strip("│").split("│")][4] == shown_radius


def test_columns_that_nothing_fills_are_left_out() -> None:
    certified = replace(FULL, attack=None, attack_radius=None, gap=None, status="certified", text=None)
    heading = text(result_table([certified])).splitlines()[1]
    assert "attack" not in heading
    assert "gap" not in heading
    assert "text" not in heading
    attacked = replace(FULL, certificate=None, certified_radius=None, gap=None, certificates={})
    heading = text(result_table([attacked])).splitlines()[1]
    assert "certified" not in heading
    assert "attack" in heading


def test_a_fixed_budget_shows_how_much_of_the_goal_it_uses() -> None:
    shown_table = text(result_table([replace(FULL, epsilon=0.01, usage=0.25, attack_radius=None, gap=None)]))
    assert "25.0%" in shown_table
    assert "within 0.01" in shown_table


def test_margins_have_their_own_heading() -> None:
    assert "margin" in text(result_table([replace(FULL, tolerance=None, margin=2.0)]))


def test_median_gap_counts_the_rows_that_have_one() -> None:
    assert "median gap 3.1 over 3 of 4 inputs" in text(result_table([*rows(3), EMPTY]))


def test_the_best_certificate_is_starred() -> None:
    lines = text(certificate_table([FULL])).splitlines()
    assert any("0.1*" in line and "probabilistic (1e-09)" in line for line in lines)
    assert not any("0.05*" in line for line in lines)


def test_one_certificate_needs_no_second_table() -> None:
    assert certificate_table([replace(FULL, certificates={"b": FULL.certificates["b"]})]) is None
    assert certificate_table([EMPTY]) is None


def test_many_inputs_are_summarised() -> None:
    shown_table = text(certificate_table(rows(MOST_COLUMNS + 1)))
    line = next(line for line in shown_table.splitlines() if "│ a " in line)
    assert "50.0%" in line  # 0.05 of the best 0.1
    assert f"{MOST_COLUMNS + 1}" in line


def test_a_certificate_that_some_inputs_lack_has_a_dash() -> None:
    other = replace(FULL, input_id="0002-cd", certificates={"b": CertificateEntry(0.2, "probabilistic", 1e-9, 0.1)})
    line = next(line for line in text(certificate_table([FULL, other])).splitlines() if "│ a " in line)
    assert line.rstrip(" │").endswith("-")


def test_layers_with_the_reason() -> None:
    layers = [
        LayerInfo("a", "BertAttention", True, heads=12, d=384, k=32, v=32, e=384, mask="none"),
        LayerInfo("b", "Rotary", False, "rotary position embeddings are not modelled"),
    ]
    shown_table = text(layer_table(layers))
    assert "no: rotary position embeddings are not modelled" in shown_table
    assert "1 of 2 supported" in shown_table


@pytest.mark.parametrize("count", [0, 1, 3, MANY_INPUTS + 1])
def test_plots_of_any_size(count: int) -> None:
    assert gap_plot(rows(count), title="title").startswith(PNG)


def test_rows_without_radii_do_not_break_the_plot() -> None:
    odd = [
        EMPTY,
        replace(FULL, attack_radius=None, gap=None, status="not_found"),
        replace(FULL, certified_radius=0.0, gap=None),
        replace(FULL, certified_radius=0.0, attack_radius=0.0, gap=None, status="misclassified"),
        replace(FULL, attack_radius=0.05, gap=0.5, status="unsound"),
    ]
    assert gap_plot(odd, title="title").startswith(PNG)
    assert gap_plot(odd * MANY_INPUTS, title="title").startswith(PNG)


@pytest.mark.parametrize("sentence", ["from $5 to $6_a^b", "猫 and 🐈", "$\\frac{$", "a\tb"])
def test_any_text_can_be_drawn(sentence: str) -> None:
    """Dollar signs start no formula, and a character that the font lacks gives way to the identifier."""
    assert gap_plot([replace(FULL, text=sentence, input_id=f"id-{sentence}")], title=sentence).startswith(PNG)


def test_the_same_rows_make_the_same_picture() -> None:
    assert gap_plot(rows(3), title="title") == gap_plot(rows(3), title="title")


def test_what_a_goal_is_about_is_drawn_and_tabled() -> None:
    scoped = [replace(FULL, goal_scope="not the model")]
    assert "not the model" in text(result_table(scoped))
    assert "not the model" in text(summary_table(scoped))
    assert "not the model" not in text(summary_table([FULL]))
    assert gap_plot(scoped, title="title") != gap_plot([FULL], title="title")


def test_rows_of_several_layers_say_of_which() -> None:
    assert "layer" not in text(result_table([FULL])).splitlines()[1]
    assert "other" in text(result_table([FULL, replace(FULL, layer="other")]))


def test_names_in_the_order_in_which_people_count() -> None:
    assert sorted(["x10", "x2", "layer.10.a", "layer.9.b"], key=natural_order) == [
        "layer.9.b",
        "layer.10.a",
        "x2",
        "x10",
    ]
    assert shortened("a" * 12, 10) == "a" * 7 + "..."
    assert shortened("a" * 10, 10) == "a" * 10


def test_bounds_are_rounded_so_that_they_stay_true() -> None:
    assert shown_bound(0.104198879, up=False) == "0.1041"
    assert shown_bound(0.159228, up=True) == "0.1593"
    assert shown_bound(0.2, up=True) == shown_bound(0.2, up=False) == "0.2"
    assert rounded(0.12341, up=True, digits=4) == 0.1235
    assert rounded(0.12349, up=False, digits=4) == 0.1234
    assert [exactly(value) for value in (0.123456789, 3.0, 1e-9)] == ["0.123456789", "3", "1e-09"]
    assert shown_bound(None, up=True) == shown_bound(math.nan, up=False) == "-"
