"""Plots of a run, each as the bytes of a PNG."""

import io
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attnrobust.reports.tables import BLUE, GREY, ORANGE, drawable, gap_scatter, plain_ticks, shown
from attnrobust.runs.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144


def _png(width: float, height: float, draw: Callable[["Figure"], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def scatter_plot(rows: Sequence[Row]) -> bytes:
    """Attack radius against certified radius of every row; no point may cross the diagonal."""
    return _png(6.4, 6.0, lambda figure: gap_scatter(figure, rows))


def gaps_by_method(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Attack radius / certified radius of every row that has both, for each certificate; tightest median first."""
    gaps: dict[str, list[float]] = {}
    for row in rows:
        for name, entry in row.certificates.items():
            if entry.radius > 0 and row.attack_radius is not None:
                gaps.setdefault(name, []).append(row.attack_radius / entry.radius)
    return dict(sorted(gaps.items(), key=lambda item: statistics.median(item[1])))


def gap_boxes(rows: Sequence[Row]) -> bytes:
    """Box plot of the gap of each certificate, and of the best of each row."""
    best = [row.gap for row in rows if row.gap is not None]
    groups = {"best of each row": best} | gaps_by_method(rows) if best else {}

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        boxes = axes.boxplot(
            list(groups.values()), orientation="horizontal", tick_labels=list(groups), patch_artist=True, widths=0.6,
            medianprops={"color": "black", "linewidth": 1.6}, flierprops={"marker": ".", "markeredgecolor": GREY},
        )  # fmt: skip
        for index, patch in enumerate(boxes["boxes"]):
            patch.set(facecolor=ORANGE if index == 0 else BLUE, alpha=0.75)
        for y, values in enumerate(groups.values(), start=1):
            median = shown(statistics.median(values), 3)
            axes.annotate(median, (1.01, y), xycoords=("axes fraction", "data"), va="center")
        axes.set_xscale("log")
        axes.set_ylim(len(groups) + 0.6, 0.4)
        plain_ticks(axes.xaxis)
        axes.axvline(1.0, color=GREY, linewidth=1.0)
        axes.set_xlabel("gap = attack radius / certified radius (1 is exact); median at the right")
        axes.grid(axis="x", which="both", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)

    return _png(8.0, 1.3 + 0.36 * max(len(groups), 2), draw if groups else _nothing)


def radii_by_layer(rows: Sequence[Row]) -> bytes:
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

    return _png(8.0, 1.6 + 0.6 * max(len(layers), 2), draw if any(certified) or any(attacked) else _nothing)


def _nothing(figure: "Figure") -> None:
    axes = figure.add_subplot()
    axes.axis("off")
    axes.text(0.5, 0.5, "no row has the radii for this plot", ha="center", color=GREY)
