"""Tables for the terminal and plots for a file, from rows."""

import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from attnrobust.models.listing import LayerInfo
from attnrobust.results import Status
from attnrobust.runs.rows import Row

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#8C8C8C", "#D55E00"  # Okabe and Ito: told apart by every common eye
MANY_INPUTS = 40
"""More inputs than this are drawn as a scatter plot instead of one line each."""
MOST_COLUMNS = 8
"""More inputs than this are summarised in the table of certificates instead of one column each."""

_STYLE = {Status.FOUND: "green", Status.CERTIFIED: "green", Status.UNSOUND: "bold white on red", Status.ERROR: "red"}
_PLAIN = {"not_found": "not found"}


# ---- numbers ---------------------------------------------------------------------------------------------------------


MOST_DIGITS = 1e6
"""From here on numbers are shown with an exponent."""


def shown(value: float | None, digits: int = 4) -> str:
    """A number for people: ``digits`` significant digits, a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < MOST_DIGITS else text


# ---- tables ----------------------------------------------------------------------------------------------------------


def result_table(rows: Sequence[Row], *, title: str | None = None) -> Table:
    """One line per input: sizes, the best certificate, the attack, the gap, the status, the seconds.

    Args:
        rows: The rows, all of one command.
        title: Above the table.

    Returns:
        A rich table; columns that no row fills are left out.
    """
    table = Table(title=title, title_justify="left", caption=_caption(rows), caption_justify="left")
    table.add_column("input", overflow="fold", max_width=28)
    texts = any(r.text for r in rows)
    if texts:
        table.add_column("text", no_wrap=True)
    table.add_column("n", justify="right")
    certified, attacked = any(r.certified_radius is not None for r in rows), any(r.attack is not None for r in rows)
    columns = [("margin" if any(r.margin is not None for r in rows) else "tolerance", True)]
    columns += [("certified", certified), ("by", certified), ("attack", attacked), ("gap", certified and attacked)]
    budgeted = any(r.epsilon is not None for r in rows)
    columns.append(("usage", budgeted))
    for name, there in columns:
        if there:
            table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("s", justify="right")
    for row in rows:
        status = Text(_PLAIN.get(row.status, str(row.status)), style=_STYLE.get(Status(row.status), "yellow"))
        cells: list[str | Text] = [row.input_id]
        if texts:
            cells.append(_short(row.text or "-", 32))
        cells += [str(row.n), shown(row.margin if row.tolerance is None else row.tolerance)]
        if certified:
            cells += [shown(row.certified_radius), row.certificate or "-"]
        if attacked:
            cells.append(shown(row.attack_radius))
        if certified and attacked:
            cells.append(shown(row.gap, 3))
        if budgeted:
            cells.append("-" if row.usage is None else f"{row.usage:.1%}")
        table.add_row(*cells, status, f"{(row.seconds_certify or 0.0) + (row.seconds_attack or 0.0):.2f}")
    return table


def certificate_table(rows: Sequence[Row]) -> Table | None:
    """Certified radius of every certificate, the best of each input marked by a star; None if there are not two.

    Args:
        rows: The rows; up to ``MOST_COLUMNS`` inputs have a column each, more are summarised.
    """
    certified = [row for row in rows if row.certificates]
    methods = list(dict.fromkeys(name for row in certified for name in row.certificates))
    if len(methods) < 2:
        return None
    table = Table(title="certified radius by certificate (* best of its input)", title_justify="left")
    table.add_column("certificate", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    if len(certified) > MOST_COLUMNS:
        return _certificate_summary(table, certified, methods)
    for name in _column_names([row.input_id for row in certified]):
        table.add_column(name, justify="right", no_wrap=True)
    for method in methods:
        cells = [_certificate_cell(row, method) for row in certified]
        table.add_row(method, _kind(certified, method), *cells)
    return table


def _certificate_summary(table: Table, rows: Sequence[Row], methods: Sequence[str]) -> Table:
    for name in ("median radius", "median share of best", "best on", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in methods:
        having = [row for row in rows if method in row.certificates]
        radii = [row.certificates[method].radius for row in having]
        shares = [r / row.certified_radius for r, row in zip(radii, having, strict=True) if row.certified_radius]
        best = sum(row.certificate == method for row in rows)
        share = f"{statistics.median(shares):.1%}" if shares else "-"
        table.add_row(method, _kind(rows, method), shown(statistics.median(radii)), share, str(best), str(len(having)))
    return table


def _certificate_cell(row: Row, method: str) -> Text:
    entry = row.certificates.get(method)
    if entry is None:
        return Text("-")
    best = row.certificate == method
    return Text(shown(entry.radius, 3) + ("*" if best else " "), style="bold green" if best else "")


def _kind(rows: Sequence[Row], method: str) -> str:
    entry = next(row.certificates[method] for row in rows if method in row.certificates)
    return entry.kind if entry.failure_probability == 0 else f"{entry.kind} ({entry.failure_probability:.0e})"


def _column_names(identifiers: Sequence[str]) -> list[str]:
    """The part before the first dash (a line number) where that tells the inputs apart."""
    heads = [name.split("-", 1)[0] for name in identifiers]
    return [_short(name) for name in (heads if len(set(heads)) == len(heads) else identifiers)]


def _short(name: str, most: int = 10) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _caption(rows: Sequence[Row]) -> str | None:
    """Medians and what stands behind the letters; the messages of rows that failed are printed apart."""
    if not rows:
        return None
    parts = [f"threat {rows[0].threat}, goal {rows[0].goal}"]
    if rows[0].epsilon is not None:
        parts.append(f"usage: share of the goal's budget that the worst point within {shown(rows[0].epsilon)} uses")
    gaps = [row.gap for row in rows if row.gap is not None]
    if gaps:
        parts.append(f"median gap {shown(statistics.median(gaps), 3)} over {len(gaps)} of {len(rows)} inputs")
    return "; ".join(parts)


SUMMARY = (
    "layer",
    "threat",
    "goal",
    "rows",
    "median certified",
    "median attack",
    "median gap",
    "largest gap",
    "status",
)


def summary_lines(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Per layer, threat and goal of many rows: medians over the inputs, and how the rows ended.

    Args:
        rows: Any rows.

    Returns:
        The heading, and one tuple of cells for each group.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.threat, row.goal), []).append(row)
    lines = []
    for key, group in groups.items():
        gaps = [row.gap for row in group if row.gap is not None]
        statuses = Counter(_PLAIN.get(row.status, str(row.status)) for row in group)
        medians = (_median(r.certified_radius for r in group), _median(r.attack_radius for r in group), _median(gaps))
        told = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        lines.append((*key, str(len(group)), *map(shown, medians), shown(max(gaps, default=None), 3), told))
    return SUMMARY, lines


def summary_table(rows: Sequence[Row]) -> Table:
    """``summary_lines`` for the terminal."""
    heading, lines = summary_lines(rows)
    table = Table(title=f"{len(rows)} rows", title_justify="left")
    for place, name in enumerate(heading):
        words = place < 3 or name == "status"
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def layer_table(layers: Sequence[LayerInfo]) -> Table:
    """One line per attention layer of a model.

    Args:
        layers: From ``Model.layers``.
    """
    table = Table(caption=f"{sum(i.supported for i in layers)} of {len(layers)} supported", caption_justify="left")
    for name in ("layer", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("heads", "d", "out"):
        table.add_column(name, justify="right")
    table.add_column("mask")
    table.add_column("supported", overflow="fold")
    for i in layers:
        sizes = ["-" if size is None else str(size) for size in (i.heads, i.d, i.e)]
        table.add_row(i.name, i.kind, *sizes, i.mask, "yes" if i.supported else f"no: {i.reason}")
    return table


# ---- plots -----------------------------------------------------------------------------------------------------------


def gap_plot(rows: Sequence[Row], *, title: str) -> bytes:
    """Certified radius and attack radius of every input on one logarithmic axis, as a PNG.

    Up to ``MANY_INPUTS`` inputs have a line each: the true robust radius lies on the bar between the marks. More are
    a scatter plot with the diagonal that no point may cross.

    Args:
        rows: The rows; those without any radius are named in a footnote.
        title: Above the axes.

    Returns:
        The PNG's bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if _positive(row.certified_radius) or _positive(row.attack_radius)]
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    if not drawn:
        axes = figure.add_subplot()
        axes.axis("off")
        axes.text(0.5, 0.5, "no input has a radius to draw", ha="center", color=GREY)
    elif len(drawn) > MANY_INPUTS:
        figure.set_size_inches(7.5, 7.0)
        gap_scatter(figure, drawn)
    else:
        figure.set_size_inches(9.0, 1.9 + 0.44 * max(len(drawn), 3))
        _lines(figure, drawn)
    _headings(figure, rows, drawn, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _positive(value: float | None) -> bool:
    return value is not None and value > 0


def _headings(figure: "Figure", rows: Sequence[Row], drawn: Sequence[Row], title: str) -> None:
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=11, parse_math=False)
    if len(drawn) < len(rows):
        missing = [drawable(_short(row.input_id, 24)) for row in rows if row not in drawn]
        names = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        figure.supxlabel(f"not drawn, no radius: {names}", fontsize=8, color=GREY, x=0.01, ha="left", parse_math=False)


def _lines(figure: "Figure", rows: Sequence[Row]) -> None:
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        low, high = row.certified_radius or math.nan, row.attack_radius or math.nan
        others = [e.radius for name, e in row.certificates.items() if e.radius > 0 and name != row.certificate]
        axes.plot(others, [y] * len(others), "|", color=GREY, markersize=8, label="other certificates" * (y == 0))
        axes.plot(
            [low, high], [y, y], "-", color=RED if row.status == Status.UNSOUND else GREY, linewidth=1.6, zorder=1
        )
        axes.plot(low, y, "o", color=BLUE, markersize=7, label="certified radius (lower bound)" * (y == 0))
        axes.plot(high, y, "D", color=ORANGE, markersize=7, label="attack radius (upper bound)" * (y == 0))
        if not _positive(row.attack_radius) and row.attack is not None:
            axes.annotate("no violation found", (low, y), (8, -3), textcoords="offset points", fontsize=8, color=GREY)
        if row.gap is not None:
            unsound = row.status == Status.UNSOUND
            note = f"gap {row.gap:.3g}" + (" UNSOUND" if unsound else "")
            at = (math.sqrt(low * high), y)
            axes.annotate(
                note, at, (0, 5), textcoords="offset points", ha="center", fontsize=8, color=RED * unsound or "black"
            )
    labels = [f"{_row_label(row)}  (n = {row.n})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.margins(x=0.06)
    axes.set_xlabel(_radius_label(rows))
    axes.grid(axis="x", which="both", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)


def gap_scatter(figure: "Figure", rows: Sequence[Row]) -> None:
    """Draw attack against certified radius into a figure, with the diagonal that no point may cross."""
    axes = figure.add_subplot()
    pairs = [r for r in rows if _positive(r.certified_radius) and _positive(r.attack_radius)]
    for status, colour, marker in ((False, BLUE, "o"), (True, RED, "X")):
        chosen = [r for r in pairs if (r.status == Status.UNSOUND) is status]
        x, y = [r.certified_radius or 0.0 for r in chosen], [r.attack_radius or 0.0 for r in chosen]
        if chosen:
            axes.scatter(x, y, s=18, alpha=0.7, color=colour, marker=marker, label="UNSOUND" if status else "input")
    ends = [v for r in pairs for v in (r.certified_radius or 0.0, r.attack_radius or 0.0)] or [1.0]
    span = [min(ends) / 1.3, max(ends) * 1.3]
    for factor, style in ((1.0, "-"), (2.0, "--"), (10.0, ":")):
        axes.plot(span, [factor * v for v in span], style, color=GREY, linewidth=1.0, label=f"gap {factor:g}")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("certified " + _radius_label(rows))
    axes.set_ylabel("attack " + _radius_label(rows))
    axes.grid(which="both", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


def _row_label(row: Row) -> str:
    """The row's text, or its identifier where the plot's font lacks a character of it."""
    text = _short(row.text or row.input_id, 34)
    return text if drawable(text) == text else drawable(row.input_id)


def drawable(text: str) -> str:
    """The text with a question mark for every character that the plot's font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)


def plain_ticks(axis: "Axis") -> None:
    """Ticks of a logarithmic axis as 0.02 instead of 2 x 10^-2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    few = math.log10(high / low) > 2.0
    axis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _radius_label(rows: Sequence[Row]) -> str:
    threats = {row.threat for row in rows}
    return f"radius ({threats.pop() if len(threats) == 1 else 'threat'} distance, units of the token vectors)"
