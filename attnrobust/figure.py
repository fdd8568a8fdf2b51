"""Figures as bytes, and the drawing of one comparison; imports matplotlib as ``reports.plots`` does."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attnrobust.text import shown_bound

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#8C8C8C", "#D55E00"  # Okabe and Ito: told apart by every common eye
DPI = 144


def png(width: float, height: float, draw: Callable[["Figure"], None], *, dpi: int = DPI) -> bytes:
    """The bytes of a figure of this size in inches."""
    return rendered(width, height, draw, formats=("png",), dpi=dpi)["png"]


def rendered(
    width: float, height: float, draw: Callable[["Figure"], None], *, formats: Sequence[str], dpi: int = DPI
) -> dict[str, bytes]:
    """One figure of this size in inches in several formats, "png" or "svg"; the same figure gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    nameless: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    found = {}
    for kind in formats:
        buffer = io.BytesIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnrobust"}):
            figure.savefig(buffer, format=kind, dpi=dpi, metadata=nameless[kind])
        found[kind] = buffer.getvalue()
    return found


def drawable(text: str) -> str:
    """The text with a question mark for every character that the plot's font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)


def plain_ticks(axis: "Axis") -> None:
    """Ticks of a logarithmic axis as 0.02 instead of 2 x 10^-2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.0 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def sides_plot(certified: Mapping[str, float], attacked: Mapping[str, float], *, title: str) -> bytes:
    """The radius of every certificate and of the attack on one logarithmic axis, as a PNG.

    Args:
        certified: Lower bounds by name; a radius of 0 is written beside its name.
        attacked: Upper bounds by name; one that is not finite is written beside its name, too.
        title: Above the axes.

    Returns:
        The PNG's bytes.
    """
    certified = dict(sorted(certified.items(), key=lambda item: item[1]))
    names = [f"{name}: {shown_bound(radius, up=False)}" for name, radius in certified.items()]
    names += [
        f"{name}: {shown_bound(r, up=True) if math.isfinite(r) else 'nothing found'}" for name, r in attacked.items()
    ]
    radii = [*certified.values(), *attacked.values()]
    colours = [BLUE] * len(certified) + [ORANGE] * len(attacked)
    drawn = [place for place, radius in enumerate(radii) if 0 < radius < math.inf]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.set_yticks(range(len(names)), [drawable(name) for name in names], parse_math=False)
        axes.set_ylim(-0.6, len(names) - 0.4)
        if drawn:
            axes.set_xscale("log")
            low, high = min(radii[p] for p in drawn), max(radii[p] for p in drawn)
            axes.set_xlim(low / 1.3, high * 1.3)
            plain_ticks(axes.xaxis)
        for place in drawn:
            axes.plot([radii[place]], [place], "o", color=colours[place], markersize=8)
            axes.axvline(radii[place], color=colours[place], linewidth=0.8, alpha=0.5)
        axes.set_xlabel("radius: blue certified (lower bound), orange attack (upper bound)")
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=11, parse_math=False)

    return png(9.0, 1.5 + 0.4 * max(len(names), 2), draw)
