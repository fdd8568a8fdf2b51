"""Plots of rows, each as the bytes of a PNG; with ``attnrobust.figure`` the only file that imports matplotlib."""

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

from attnrobust.figure import BLUE, GREY, ORANGE, RED, drawable, plain_ticks, png
from attnrobust.runs.rows import Row, scopes
from attnrobust.status import Status
from attnrobust.text import shortened, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

FEW = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9")
"""Of so many layers each has a colour of its own; red is for what is unsound."""
MOST_NAMED = 24
"""Layers of a legend; more are named on hovering alone."""
WIDEST_LINE = 105
"""Characters of a line above a plot."""
MANY_INPUTS = 40
"""More inputs than this are drawn as a scatter plot instead of one line each."""
Drawing = tuple[float, float, Callable[["Figure"], None]]
"""Width and height in inches, and what draws."""


def svg(width: float, height: float, draw: Callable[["Figure"], None], *, name: str) -> str:
    """A figure as SVG to stand inside a page: text stays text, what is black takes the page's colour.

    Args:
        width: Inches.
        height: Inches.
        draw: Draws into the figure. Links of the form ``title:TEXT`` become titles that show on hovering.
        name: Unique on the page; every identifier begins with it.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0.0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return inlined(buffer.getvalue(), name)


def inlined(text: str, name: str) -> str:
    """The ``svg`` element alone, without what only a file needs, its identifiers made unique."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'<a xlink:href="title:([^"]*)"[^>]*>', r"<g><title>\1</title>", text).replace("</a>", "</g>")
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r"#000000|\bblack\b", "currentColor", text)


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
    drawn = [row for row in rows if _positive(row.certified_radius) or _positive(row.attack_radius)]

    def draw(figure: "Figure") -> None:
        if not drawn:
            nothing(figure, "no input has a radius to draw")
        elif len(drawn) > MANY_INPUTS:
            figure.set_size_inches(7.5, 7.0)
            gap_scatter(figure, drawn)
        else:
            figure.set_size_inches(9.0, 1.9 + 0.44 * max(len(drawn), 3))
            _lines(figure, drawn)
        _headings(figure, rows, drawn, title)

    return png(9.0, 6.0, draw, dpi=150)


def _positive(value: float | None) -> bool:
    return value is not None and value > 0


def _headings(figure: "Figure", rows: Sequence[Row], drawn: Sequence[Row], title: str) -> None:
    scope = "".join(f"\n{line}" for scope in scopes(rows) for line in wrap(scope, WIDEST_LINE))
    figure.suptitle(drawable(title) + scope, x=0.01, ha="left", fontsize=11, parse_math=False)
    if len(drawn) < len(rows):
        missing = [drawable(shortened(row.input_id, 24)) for row in rows if row not in drawn]
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
    several = len({row.layer for row in rows}) > 1
    labels = [f"{_row_label(row)}  ({f'{drawable(row.layer)}, ' if several else ''}n = {row.n})" for row in rows]
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
    colours, sound = _place_colours(rows), [r for r in pairs if r.status != Status.UNSOUND]
    groups = [(place, colour, "o", [r for r in sound if r.layer == place]) for place, colour in colours.items()]
    groups.append(("UNSOUND", RED, "X", [r for r in pairs if r.status == Status.UNSOUND]))
    for name, colour, marker, chosen in groups:
        x, y = [r.certified_radius or 0.0 for r in chosen], [r.attack_radius or 0.0 for r in chosen]
        if chosen:
            label = drawable(name) if len(colours) <= MOST_NAMED else "_nolegend_"
            points = axes.scatter(x, y, s=18, alpha=0.7, color=colour, marker=marker, label=label)
            points.set_urls([f"title:{_hover(row)}" for row in chosen])
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
    _without_math(axes.legend(frameon=False, fontsize=9))


def _without_math(legend: "Legend") -> None:
    """A dollar sign in a layer's name is one."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _hover(row: Row) -> str:
    """What a point says when it is pointed at."""
    gap = "" if row.gap is None else f", gap {shown(row.gap, 3)}"
    name = f"{row.input_id}, {row.layer}"
    return f"{name}: certified {shown(row.certified_radius)}, attack {shown(row.attack_radius)}{gap}"


def _row_label(row: Row) -> str:
    """The row's text, or its identifier where the plot's font lacks a character of it."""
    text = shortened(row.text or row.input_id, 34)
    return text if drawable(text) == text else drawable(row.input_id)


def _radius_label(rows: Sequence[Row]) -> str:
    threats = {row.threat for row in rows}
    return f"radius ({threats.pop() if len(threats) == 1 else 'threat'} distance, units of the token vectors)"


def scatter_plot(rows: Sequence[Row]) -> Drawing:
    """Attack radius against certified radius of every row; no point may cross the diagonal."""
    return 6.4, 6.0, lambda figure: gap_scatter(figure, rows)


def gaps_by_method(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Attack radius / certified radius of every row that has both, for each certificate; tightest median first."""
    gaps: dict[str, list[float]] = {}
    for row in rows:
        for name, entry in row.certificates.items():
            if entry.radius > 0 and row.attack_radius is not None:
                gaps.setdefault(name, []).append(row.attack_radius / entry.radius)
    return dict(sorted(gaps.items(), key=lambda item: statistics.median(item[1])))


def gap_boxes(rows: Sequence[Row]) -> Drawing:
    """Box plot of the gap of each certificate, and of the best of each row; of several layers one of the best each."""
    best = {place: [r.gap for r in rows if r.layer == place and r.gap is not None] for place in _places(rows)}
    best = {place: gaps for place, gaps in best.items() if gaps}
    groups = best
    if len(best) == 1 == len(_places(rows)):
        groups = {"best of each row": next(iter(best.values()))} | gaps_by_method(rows)
    single = groups is not best

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        boxes = axes.boxplot(
            list(groups.values()), orientation="horizontal", patch_artist=True, widths=0.6,
            medianprops={"color": "black", "linewidth": 1.6}, flierprops={"marker": ".", "markeredgecolor": GREY},
        )  # fmt: skip
        for index, patch in enumerate(boxes["boxes"]):
            patch.set(facecolor=ORANGE if index == 0 or not single else BLUE, alpha=0.75)
        for y, values in enumerate(groups.values(), start=1):
            median = shown(statistics.median(values), 3)
            axes.annotate(median, (1.01, y), xycoords=("axes fraction", "data"), va="center")
        axes.set_yticks(range(1, len(groups) + 1), [drawable(name) for name in groups], parse_math=False)
        axes.set_xscale("log")
        axes.set_ylim(len(groups) + 0.6, 0.4)
        plain_ticks(axes.xaxis)
        axes.axvline(1.0, color=GREY, linewidth=1.0)
        axes.set_xlabel("gap = attack radius / certified radius (1 is exact); median at the right")
        axes.grid(axis="x", which="both", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)

    return 8.0, 1.3 + 0.36 * max(len(groups), 2), draw if groups else nothing


def _places(rows: Sequence[Row]) -> list[str]:
    """The layers or depths of rows, each once, in their order."""
    return list(dict.fromkeys(row.layer for row in rows))


def _place_colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each layer or depth; of many, from dark to light in their order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    places = _places(rows)
    if len(places) <= len(FEW):
        return dict(zip(places, FEW, strict=False))
    shades = colormaps["viridis"]
    return {place: to_hex(shades(0.92 * i / (len(places) - 1))) for i, place in enumerate(places)}


def radii_by_layer(rows: Sequence[Row]) -> Drawing:
    """Certified and attack radii of every layer, as boxes side by side."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    certified = [[r.certified_radius for r in rows if r.layer == name and r.certified_radius] for name in layers]
    attacked = [[r.attack_radius for r in rows if r.layer == name and r.attack_radius] for name in layers]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for shift, values, colour, label in (
            (-0.18, certified, BLUE, "certified radius (lower bound)"),
            (0.18, attacked, ORANGE, "attack radius (upper bound)"),
        ):
            positions = [place + shift for place in range(len(layers))]
            boxes = axes.boxplot(
                values, positions=positions, orientation="horizontal", widths=0.3, patch_artist=True,
                manage_ticks=False, medianprops={"color": "black", "linewidth": 1.6},
                flierprops={"marker": ".", "markeredgecolor": GREY},
            )  # fmt: skip
            for patch in boxes["boxes"]:
                patch.set(facecolor=colour, alpha=0.75)
            boxes["boxes"][0].set_label(label)
        axes.set_xscale("log")
        axes.set_yticks(range(len(layers)), [drawable(name) for name in layers], parse_math=False)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        plain_ticks(axes.xaxis)
        axes.set_xlabel("radius (units of the token vectors)")
        axes.grid(axis="x", which="both", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)

    return 8.0, 1.6 + 0.6 * max(len(layers), 2), draw if any(certified) or any(attacked) else nothing


def curve_plot(rows: Sequence[Row]) -> Drawing:
    """Certified accuracy against the size: a field for each threat and goal, a pair of steps for each layer."""
    names = min(len(_places(rows)), MOST_NAMED)
    height = 1.0 + 3.2 * max(1, len({(r.threat, r.goal) for r in rows})) + 0.1 * names
    return 8.0, height, lambda f: curve_fields(f, rows)


def curve_fields(figure: "Figure", rows: Sequence[Row]) -> None:
    """Draw certified accuracy into a figure: between the two steps of a layer lies its robust share."""
    from attnrobust.reports.curve import curves

    radii = [r for row in rows for r in (row.certified_radius, row.attack_radius) if r is not None and r > 0]
    keys = list(dict.fromkeys((row.threat, row.goal) for row in rows))
    if not radii:
        nothing(figure)
        return
    colours = _place_colours(rows)
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(len(keys), 1, place)
        group = [row for row in rows if (row.threat, row.goal) == key]
        own = sorted({r for row in group for r in (row.certified_radius, row.attack_radius) if r is not None and r > 0})
        x = [own[0] / 1.5, *own, own[-1] * 1.5] if own else [1.0]
        for curve in curves(group, epsilons=x):
            certified, standing = [p.certified for p in curve.points], [1 - p.broken for p in curve.points]
            sides: tuple[tuple[list[float], Literal["pre", "post"], str, str], ...] = (
                (certified, "pre", "-", "certified"),
                (standing, "post", "--", "not broken"),
            )
            for share, where, style, side in sides:
                (line,) = axes.step(x, share, style, where=where, color=colours[curve.layer], linewidth=1.6)
                line.set_url(f"title:{curve.layer}: {side}")
        axes.set(xscale="log", ylim=(-0.03, 1.03))
        plain_ticks(axes.xaxis)
        axes.set_title(drawable(", ".join(key)), loc="left", fontsize=10, parse_math=False)
        axes.set_xlabel(f"size ({key[0]} distance)")
        axes.set_ylabel("share of the inputs")
        axes.grid(which="both", color="#E6E6E6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _curve_legend(figure, colours)


def _curve_legend(figure: "Figure", colours: Mapping[str, str]) -> None:
    """The two sides by their strokes, and the layers by their colours."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=GREY, linestyle="-", label="certified (lower bound)"),
        Line2D([], [], color=GREY, linestyle="--", label="not broken (upper bound)"),
    ]
    if len(colours) <= MOST_NAMED:
        entries += [Line2D([], [], color=colour, linewidth=3, label=drawable(name)) for name, colour in colours.items()]
    _without_math(figure.legend(handles=entries, loc="outside lower left", ncols=2, frameon=False, fontsize=8))


def nothing(figure: "Figure", message: str = "no row has the radii for this plot") -> None:
    """Say that there is nothing to draw."""
    axes = figure.add_subplot()
    axes.axis("off")
    axes.text(0.5, 0.5, message, ha="center", color=GREY)
