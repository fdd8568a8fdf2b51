"""Figures of curves, declared without a plotting library: the same figure as PNG and as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from attnrobust.figure import BLUE, GREY, ORANGE, RED, plain_ticks, rendered

COLOURS = (BLUE, ORANGE, "#009E73", RED, "#CC79A7", "#56B4E9", "#000000", GREY)
"""Okabe and Ito."""
PANEL = (4.6, 3.7)
"""Inches of one panel, without its legend."""
ENTRY = 0.17
"""Inches of one line of a legend."""
LINE = 52
"""Characters of a title above one panel."""
IN_A_LINE = 3
"""Panels side by side."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line, set of marks or band.

    Args:
        label: Entry of the legend; empty for none.
        x: Abscissas.
        y: Ordinates.
        style: As in matplotlib: "-", "--", "o", "o-", ...
        low: Lower edge of a band around the line.
        high: Its upper edge.
        colour: Number of the colour; None takes the curve's place.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One field of a figure.

    Args:
        title: Above it.
        x: Label of the abscissa.
        y: Label of the ordinate.
        curves: What is drawn.
        log_x: Logarithmic abscissa.
        log_y: Logarithmic ordinate.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = True
    log_y: bool = True


def curve_figure(panels: Sequence[Panel], *, title: str) -> dict[str, bytes]:
    """Draw panels side by side.

    Args:
        panels: At least one.
        title: Above the figure.

    Returns:
        The bytes under "png" and "svg".
    """
    columns = 2 if len(panels) == 4 else min(len(panels), IN_A_LINE)
    lines = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        fields = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, panel in zip(fields, panels, strict=False):
            _draw(axes, panel)
        for axes in fields[len(panels) :]:
            axes.axis("off")
        figure.suptitle("\n".join(wrap(title, columns * LINE)), x=0.01, ha="left", fontsize=11, parse_math=False)

    entries = max((sum(bool(curve.label) for curve in panel.curves) for panel in panels), default=0)
    height = lines * (PANEL[1] + ENTRY * entries) + 0.3
    return rendered(columns * PANEL[0], height, draw, formats=("png", "svg"), dpi=100)


def _draw(axes: Any, panel: Panel) -> None:
    drawn = any(len(curve.x) for curve in panel.curves)
    for place, curve in enumerate(panel.curves):
        colour = COLOURS[(place if curve.colour is None else curve.colour) % len(COLOURS)]
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            curve.x, curve.y, curve.style, color=colour, markersize=4, linewidth=1.4, label=curve.label or "_nolegend_"
        )
    log_x, log_y = (panel.log_x and drawn, panel.log_y and drawn)
    axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_xlabel(panel.x, parse_math=False)
    axes.set_ylabel(panel.y, parse_math=False)
    for axis, logarithmic in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if logarithmic:
            plain_ticks(axis)
    axes.grid(which="major", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    if any(curve.label for curve in panel.curves):  # below the axis, where it hides no curve
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16), borderaxespad=0.0)
