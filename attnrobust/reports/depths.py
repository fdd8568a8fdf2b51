"""The depth profile: radii of a whole model against the depth at which its tokens move."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from rich.table import Table

from attnrobust.figure import BLUE, GREY, ORANGE, drawable, plain_ticks, png
from attnrobust.reports.layout import Column, lay_out
from attnrobust.reports.plots import nothing
from attnrobust.reports.tables import percent
from attnrobust.runs.depths import DepthRadii, depth_profile
from attnrobust.runs.rows import MOVE_AT, Row, depth_place, scopes
from attnrobust.text import shown

PROFILE_NAME = "depth-profile.png"
MANY_DEPTHS = 10
"""More depths than this are numbered below the axis."""
WIDEST = 100
"""Characters of a line above the plot."""


def depth_table(profile: Sequence[DepthRadii]) -> Table:
    """One line per depth, from the input on: medians over the inputs, relative and absolute."""
    lines = [
        (
            d.depth, f"{d.found}/{d.rows}", *(percent(None if s is None else s[1]) for s in (d.attacks, d.certified)),
            *map(shown, (d.attack_radius, d.certified_radius)), shown(d.gap, 3), shown(d.input_norm),
        )
        for d in profile
    ]  # fmt: skip
    heading = ("found", "attack", "certified", "attack", "certified", "gap", "|x|")
    columns = [Column("depth", fold=False), *(Column(name, right=True, fold=False) for name in heading)]
    title = "the whole model by the depth at which its tokens move: medians over the inputs"
    caption = "percent: of |x|, the norm of all tokens at that depth; found: inputs with a verified attack"
    return lay_out(columns, lines, title=title, caption=caption)


def depth_plot(rows: Sequence[Row], *, title: str) -> bytes:
    """Radii relative to the norm of the tokens against the depth, one field for each threat and goal, as a PNG.

    Attack radii are upper bounds of the robust radius, certified ones lower bounds. A line joins the medians, a band
    spans all inputs; a depth at which nothing is certified has no mark.

    Args:
        rows: The rows; those about layers are left out.
        title: Above the fields.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.depth is not None:
            groups.setdefault((row.goal, row.threat), []).append(row)
    fields = {", ".join(key): depth_profile(group) for key, group in groups.items()}
    drawn = {key: profile for key, profile in fields.items() if any(map(_has_radius, profile))}
    scoped = [scope.partition(MOVE_AT)[0] for scope in scopes([r for group in groups.values() for r in group])]
    about = [line for scope in scoped for line in wrap(scope, WIDEST)]

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(drawn), squeeze=False)[:, 0]
        for field, (name, profile) in zip(axes, drawn.items(), strict=True):
            _field(field, profile)
            field.set_title(drawable(name), loc="left", fontsize=10, parse_math=False)
        heading = "\n".join(map(drawable, [title, *about]))
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, parse_math=False)
        figure.align_ylabels()
        found = {
            label: handle for field in axes for handle, label in zip(*field.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found, loc="outside lower right", ncols=2, frameon=False, fontsize=9)

    height = 1.4 + 0.2 * len(about) + 3.0 * max(len(drawn), 1)
    return png(8.0, height, draw if drawn else nothing)


def _tick(depth: str, *, short: bool) -> str:
    """A depth below the axis; among many, the number of its block alone."""
    return str(depth_place(depth)) if short else depth.replace("block:", "block ")


def _has_radius(depth: DepthRadii) -> bool:
    return depth.attacks is not None or bool(depth.certified and depth.certified[2] > 0)


def _field(axes: Any, profile: Sequence[DepthRadii]) -> None:
    """Both sides of one goal under one threat."""
    sides = (
        ("attack radius (upper bound)", ORANGE, "D", [d.attacks for d in profile]),
        ("certified radius (lower bound)", BLUE, "o", [d.certified for d in profile]),
    )
    for label, colour, marker, spreads in sides:
        there = [(x, s) for x, s in enumerate(spreads) if s is not None and s[0] > 0]
        places = [x for x, _ in there]
        axes.fill_between(places, [s[0] for _, s in there], [s[2] for _, s in there], color=colour, alpha=0.2, lw=0)
        if there:
            axes.plot(places, [s[1] for _, s in there], marker=marker, color=colour, linewidth=1.6, label=label)
    bare = [x for x, d in enumerate(profile) if not d.certified or d.certified[1] <= 0]
    if bare:
        axes.annotate(
            f"nothing certified at {len(bare)} of {len(profile)} depths", (0.99, 0.03), xycoords="axes fraction",
            ha="right", fontsize=8, color=GREY,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.margins(x=0.04, y=0.12)
    plain_ticks(axes.yaxis)
    many = len(profile) > MANY_DEPTHS
    axes.set_xticks(range(len(profile)), [_tick(d.depth, short=many) for d in profile], parse_math=False)
    axes.set_xlabel("depth at which the tokens move" + (" (number of the block that they enter)" if many else ""))
    axes.set_ylabel("radius / norm of the tokens there")
    axes.grid(which="both", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
