"""The report of a run: one HTML page that needs nothing from elsewhere, and its plots as files."""

import base64
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.figure import png
from attnrobust.reports.data import ReportData, read_report_data
from attnrobust.reports.depths import PROFILE_NAME, depth_plot
from attnrobust.reports.explained import explained, why_not
from attnrobust.reports.plots import (
    Drawing,
    curve_plot,
    gap_boxes,
    gaps_by_method,
    radii_by_layer,
    scatter_plot,
    svg,
)
from attnrobust.reports.tables import not_installed, percent, summary_lines
from attnrobust.reports.units import both_in_tokens, both_shares, run_verdicts, safe, scale_note
from attnrobust.runs.heat import TOP_TOKENS, HeatLine, HeatToken, heat_map, is_special
from attnrobust.runs.rows import Row, scopes
from attnrobust.runs.storage.atomic import require_writable, write_atomically
from attnrobust.runs.storage.files import REPORT_NAME, rows_digest
from attnrobust.runs.yardsticks import proved
from attnrobust.status import Status
from attnrobust.text import shown, shown_bound

MOST_ROWS, MOST_SENTENCES, MOST_LINES = 5000, 20, 4
"""What one page shows; the data has the rest."""

_BREAKS = re.compile(r"([./_,])(?=\w)")
"""Where a long name may go on in the next line."""

_BAD = frozenset({Status.UNSOUND, Status.ERROR, Status.TIMEOUT, Status.NAN, Status.DISAGREES})


def write_report(directory: Path, *, out: Path | None = None) -> tuple[Path, ...]:
    """Write the report of a directory's results: ``report.html`` and the plots beside it.

    Args:
        directory: Output directory of a run or of ``compare``.
        out: Where to write; None means the same directory.

    Returns:
        The files written, the page first.

    Raises:
        InputError: No results there, or a place that cannot be written.
    """
    target = out or directory
    require_writable(target)
    data = read_report_data(directory)
    plots = _plots(data.rows, title=data.title)
    contents = {REPORT_NAME: render(data, plots, source=directory).encode()} | {p["name"]: p["png"]() for p in plots}
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target, contents)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}; choose another --out") from error
    return tuple(target / name for name in contents)


def render(data: ReportData, plots: Sequence[Mapping[str, Any]], *, source: Path) -> str:
    """The page as text.

    Args:
        data: What it is made of.
        plots: Their PNGs with captions.
        source: The directory, for the line that makes the report again.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("attnrobust.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["breakable"] = lambda text: Markup(_BREAKS.sub(r"\1<wbr>", str(escape(text))))  # noqa: S704 - escaped
    line_template = environment.get_template("heat.html.j2")
    heat, more = heat_map(data.rows, sentences=MOST_SENTENCES)
    heading, lines = summary_lines(data.rows)
    made_from = ("This page shows these rows (SHA-256, without their seconds):", rows_digest(data.rows))
    remake = ("Make this report again:", f"attnrobust report {shlex.quote(str(source))}")
    return environment.get_template(
        "report.html.j2"
    ).render(
        title=data.title,
        subtitle=data.subtitle,
        digest=rows_digest(data.rows),
        missing=max(0, data.planned - len(data.rows)),
        planned=data.planned,
        notes=[
            *scopes(data.rows),
            *not_installed(data.rows),
            *_common(data.rows),
            *filter(None, [scale_note(data.rows)]),
        ],
        unsound=[row for row in data.rows if row.status == Status.UNSOUND],
        tiles=_tiles(data),
        verdicts=run_verdicts(data.rows),
        summary={"heading": heading, "lines": lines},
        plots=[dict(plot) | {"svg": plot["svg"] and Markup(plot["svg"])} for plot in plots],  # noqa: S704 - matplotlib escapes
        facets=[
            {
                "name": ", ".join(key),
                "tiles": _radius_tiles(group),
                "methods": _methods(group),
                "several": len(_by_place(group)) > 1,
            }
            for key, group in _facets(data.rows).items()
        ],
        certificates=explained(data.rows),
        reasons=why_not(data.rows),
        heat=heat,
        by_radius=any(line.by_radius for sentence in heat for line in sentence.lines),
        more_sentences=more,
        special=sorted({t.text for s in heat for line in s.lines for t in line.tokens if is_special(t.text)}),
        heat_line=lambda line: Markup(line_template.render(_heat_values(line))),  # noqa: S704 - the template escapes
        lines_shown=MOST_LINES,
        verdicts_shown=MOST_LINES,
        top_tokens=TOP_TOKENS,
        key=[_colours(s) | {"label": f"{s:.0%}"} for s in (0.1, 0.25, 0.5, 0.75, 1.0)],
        table=_table(_without_common(data.rows)[:MOST_ROWS]),
        rows_left_out=max(0, len(data.rows) - MOST_ROWS),
        steps=[{"what": what, "code": code} for what, code in (*data.steps, made_from, remake)],
    )


# ---- parts -----------------------------------------------------------------------------------------------------------


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """What may be told of all rows together: how many there are and how they ended; radii have no common unit."""
    statuses = Counter(str(row.status) for row in data.rows)
    there = f"{len(data.rows)}" if len(data.rows) == data.planned else f"{len(data.rows)} of {data.planned}"
    return [("rows", there), *((status.replace("_", " "), str(count)) for status, count in statuses.most_common())]


def _radius_tiles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Figures of rows of one threat and goal; none where they are of several layers, which have a table."""
    if len(_by_place(rows)) > 1:
        return []
    certified = [row.certified_radius for row in rows if row.certified_radius is not None]
    attacked = [row.attack_radius for row in rows if row.attack_radius is not None]
    gaps = [row.gap for row in rows if row.gap is not None]
    tiles: list[tuple[str, str]] = []
    if certified:
        tiles += [("median certified radius", safe(statistics.median(certified), up=False))]
        tiles += [("smallest certified radius", safe(min(certified), up=False))]
    if attacked:
        tiles.append(("median attack radius", safe(statistics.median(attacked), up=True)))
    if gaps:
        tiles += [("median gap", safe(statistics.median(gaps), up=True)), ("largest gap", safe(max(gaps), up=True))]
    return tiles


def _facets(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by threat and goal: only within these do radii have one unit and one meaning."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.threat, row.goal), []).append(row)
    return groups


def _by_place(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by layer or depth; radii of different ones are never pooled."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.layer, []).append(row)
    return groups


def _plots(rows: Sequence[Row], *, title: str = "") -> list[dict[str, Any]]:
    """The plots of each threat and goal, and the depth profile, which has its own fields."""
    plots = []
    facets = _facets(rows) or {("", ""): []}
    for number, (key, group) in enumerate(facets.items(), start=1):
        suffix = "" if len(facets) == 1 else f"-{number}"
        plots += [_drawn(*drawing, suffix=suffix, facet=", ".join(key)) for drawing in _drawings(group)]
    if len({row.layer for row in rows if row.depth is not None}) > 1:
        about = "Radii as shares of the norm of the tokens at the depth where they move: medians, band of all inputs."
        picture = depth_plot(rows, title=title)
        data = base64.b64encode(picture).decode()
        profile = {"name": PROFILE_NAME, "png": lambda: picture, "data": data, "svg": None}
        plots.insert(0, profile | {"width": 800, "caption": about, "alt": _alt("Both radii against the depth", rows)})
        plots[0]["facet"] = ""
    return plots


Named = tuple[str, Drawing, str, str]


def _drawings(rows: Sequence[Row]) -> list[Named]:
    """File name, drawing, caption and description of each plot of rows of one threat and goal."""
    whole, several = any(row.depth is not None for row in rows), len(rows) > 1
    place = "depth" if whole else "layer"
    made: list[Named] = []
    if not whole or any(row.gap is not None for row in rows):
        places = len(_by_place(rows))
        about = (
            "Gap of each certificate, the tightest first."
            if places == 1
            else f"Gap of the best certificate by {place}."
        )
        made.append(("gap-by-method", gap_boxes(rows), about, "Box plot of the gap of each certificate"))
        about = "Attack radius against certified radius, one point a row. No point may lie below the solid line."
        name = "attack-against-certified"
        made.append((name, scatter_plot(rows), about, "Scatter plot of attack radius against certified radius"))
    about = f"Radii of each {place} over all its inputs."
    made.append(("radius-by-layer", radii_by_layer(rows), about, f"Box plot of both radii by {place}"))
    if several and any(row.certified_radius for row in rows):
        about = f"Certified accuracy: the robust share of the inputs of each {place} lies between its two steps."
        made.append(("certified-accuracy", curve_plot(rows), about, "Steps of the certified and the not broken share"))
    return [(name, drawing, about, _alt(alt, rows)) for name, drawing, about, alt in made]


def _drawn(name: str, drawing: Drawing, caption: str, alt: str, *, suffix: str, facet: str) -> dict[str, Any]:
    width, height, _ = drawing
    return {
        "name": f"{name}{suffix}.png", "png": lambda: png(*drawing), "svg": svg(*drawing, name=f"{name}{suffix}"),
        "width": round(100 * width), "height": round(100 * height), "caption": caption, "alt": alt, "facet": facet,
    }  # fmt: skip


def _alt(text: str, rows: Sequence[Row]) -> str:
    gaps = [row.gap for row in rows if row.gap is not None] if len(_facets(rows)) == 1 else []
    numbers = f"; median gap {shown(statistics.median(gaps), 3)}, largest {shown(max(gaps), 3)}" if gaps else ""
    return f"{text}{numbers}. The numbers are in the tables."


def _common(rows: Sequence[Row]) -> list[str]:
    """The message that every row has, if there is one: it is told once, not in every line."""
    messages = {row.message for row in rows}
    return [message for message in messages if message is not None] if len(rows) > 1 and len(messages) == 1 else []


def _without_common(rows: Sequence[Row]) -> Sequence[Row]:
    return [replace(row, message=None) for row in rows] if _common(rows) else rows


def _methods(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "place": place,
            "name": name,
            "cells": [str(len(gaps)), *(shown(f(gaps), 3) for f in (statistics.median, min, max))],
        }
        for place, group in _by_place(rows).items()
        for name, gaps in gaps_by_method(group).items()
    ]


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Columns and lines; what is the same in every row goes to the caption."""
    columns = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
    same = {n: cells[0]["shown"] for n, cells in columns.items() if n in _MAY_BE_SAME and len(_shown(cells)) == 1}
    kept = {n: cells for n, cells in columns.items() if n not in same and _shown(cells) != {""}}
    return {
        "columns": [{"name": n, "number": bool(cells) and cells[0]["kind"] == "number"} for n, cells in kept.items()],
        "lines": list(zip(*kept.values(), strict=True)),
        "same": ", ".join(f"{name}: {value}" for name, value in same.items() if value),
    }


def _shown(cells: Sequence[Mapping[str, Any]]) -> set[str]:
    return {cell["shown"] for cell in cells}


def _status(row: Row) -> dict[str, Any]:
    status = str(row.status).replace("_", " ") + (f": {row.message}" if row.message else "")
    return _word(status, "bad" if row.status in _BAD else "")


def _word(text: str, kind: str = "") -> dict[str, Any]:
    return {"shown": text, "kind": kind, "sort": None}


def _classes(row: Row) -> str:
    """The class that must stay, and the one at the attack's point."""
    return (row.label or "") + ("" if row.attack_label is None else f" \N{RIGHTWARDS ARROW} {row.attack_label}")


def _share(value: float | None) -> dict[str, Any]:
    cell = _number(value)
    return cell | {"shown": "" if value is None else percent(value)}


def _number(value: float | None) -> dict[str, Any]:
    """A cell that sorts by its value; NaN, where there is none, sorts last."""
    return {"shown": shown(value), "kind": "number", "sort": math.nan if value is None else value}


def _bound(value: float | None, *, up: bool) -> dict[str, Any]:
    return _number(value) | {"shown": shown_bound(value, up=up)}


_COLUMNS: Mapping[str, Callable[[Row], dict[str, Any]]] = {
    "input": lambda row: _word(row.input_id, "name"),
    "text": lambda row: _word(row.text or "", "text"),
    "layer": lambda row: _word(row.layer if row.depth is None else ""),
    "depth": lambda row: _word("" if row.depth is None else row.layer),
    "class": lambda row: _word(_classes(row)),
    "threat": lambda row: _word(row.threat),
    "goal": lambda row: _word(row.goal),
    "n": lambda row: _number(float(row.n)),
    "budget": lambda row: _number(row.tolerance if row.margin is None else row.margin),
    "certified": lambda row: _bound(proved(row), up=False),
    "by": lambda row: _word(row.certificate or ""),
    "attack": lambda row: _bound(row.attack_radius, up=True),
    "of the norm": lambda row: _share(row.relative_attack if row.depth is not None else None),
    "share of the norm": lambda row: _word("" if both_shares(row) == "-" else both_shares(row)),
    "of a token's norm": lambda row: _word("" if both_in_tokens(row) == "-" else both_in_tokens(row)),
    "gap": lambda row: _bound(row.gap, up=True),
    "status": _status,
    "seconds": lambda row: _number(round((row.seconds_certify or 0.0) + (row.seconds_attack or 0.0), 2)),
}
_MAY_BE_SAME = ("layer", "depth", "threat", "goal", "by")


def _heat_values(line: HeatLine) -> dict[str, Any]:
    return {
        "line": line,
        "radius": shown_bound(line.row.attack_radius, up=True),
        "certified": None if line.row.certified_radius is None else shown_bound(line.row.certified_radius, up=False),
        "words": [_heat_word(line, token) for token in line.tokens],
        "told": "Smallest radii of one token alone" if line.by_radius else "Most of the move",
        "strongest": [
            {"text": token.text, "share": _heat_number(line, token, ".0%"), "special": is_special(token.text)}
            for token in line.strongest
        ],
    }


def _heat_number(line: HeatLine, token: HeatToken, form: str) -> str:
    """What is said of a token: its own radii, the certified one first where there is one, or its share of the move."""
    if not line.by_radius:
        return format(token.share, form)
    found = "no radius found" if token.radius is None else shown_bound(token.radius, up=True)
    return found if token.certified is None else f"{shown_bound(token.certified, up=False)} to {found}"


def _heat_word(line: HeatLine, token: HeatToken) -> dict[str, Any]:
    colours = _colours(token.strength)
    of = "moving alone" if line.by_radius else "of the move"
    return {
        "text": token.text, "top": token.top, "share": f"{_heat_number(line, token, '.1%')} {of}",
        "special": is_special(token.text), "background": colours["background"], "colour": colours["text"],
        "alone": _colours(_alone(line, token)),
    }  # fmt: skip


def _alone(line: HeatLine, token: HeatToken) -> float:
    """The token's strength relative to the strongest of those that are not special."""
    others = [other.strength for other in line.tokens if not is_special(other.text)]
    return min(1.0, token.strength / max(others)) if any(others) else 0.0


def _colours(strength: float) -> dict[str, str]:
    """One hue from white to dark blue, and black or white text, whichever stands out more (at least 4.5 to 1)."""
    white, dark = (255, 255, 255), (0, 74, 120)
    mixed = tuple(round(w + (d - w) * strength**0.7) for w, d in zip(white, dark, strict=True))
    light = _luminance(mixed)
    text = "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"
    return {"background": "#{:02x}{:02x}{:02x}".format(*mixed), "text": text}


def _luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
