"""Tables of rows and layers for the terminal."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.text import Text

from attnrobust.models.listing import LayerInfo
from attnrobust.reports.layout import Column, FittingTable, lay_out, numbers, words
from attnrobust.reports.narrow import BETWEEN, STEPS
from attnrobust.reports.units import both_in_tokens, both_shares
from attnrobust.runs.rows import Row, median, scopes
from attnrobust.runs.yardsticks import TOKEN, WHOLE, proved, yardstick
from attnrobust.status import Status
from attnrobust.text import shortened, shown, shown_bound

MOST_COLUMNS = 8
"""More inputs than this are summarised in the table of certificates instead of one column each."""

LONGEST_CLASS = 16
"""Characters of the name of a class in a table."""

_STYLE = {Status.FOUND: "green", Status.CERTIFIED: "green", Status.UNSOUND: "bold white on red", Status.ERROR: "red"}
_STYLE |= {Status.DISAGREES: "red"}
_PLAIN = {"not_found": "not found", "disagrees": "disagrees with the model"}
_INSTALL = "pip install"


def _status(row: Row) -> Text:
    return Text(_PLAIN.get(row.status, str(row.status)), style=_STYLE.get(Status(row.status), "yellow"))


def percent(value: float | None) -> str:
    """A share for people: three significant digits, a dash where there is none."""
    return "-" if value is None else f"{shown(100.0 * value, 3)}%"


def _classes(row: Row) -> str:
    """The class that must stay, and the one at the attack's point."""
    label = shortened(row.label or "-", LONGEST_CLASS)
    return label if row.attack_label is None else f"{label}{BETWEEN}{shortened(row.attack_label, LONGEST_CLASS)}"


_CELLS: Mapping[Column, Callable[[Row], str | Text]] = {
    Column("input", widest=28): lambda row: row.input_id,
    Column("text", fold=False): lambda row: shortened(row.text or "-", 32),
    Column("layer"): lambda row: row.layer,
    Column("at", fold=False): lambda row: row.layer,
    Column("class"): _classes,
    Column("n", right=True): lambda row: str(row.n),
    Column("margin", right=True, fold=False): lambda row: shown(row.margin if row.tolerance is None else row.tolerance),
    Column("tolerance", right=True, fold=False): lambda row: shown(row.tolerance),
    Column("certified", right=True, fold=False): lambda row: shown_bound(proved(row), up=False),
    Column("by", fold=False): lambda row: row.certificate or "-",
    Column("attack", right=True, fold=False): lambda row: shown_bound(row.attack_radius, up=True),
    Column("of |x|", right=True, fold=False): lambda row: percent(row.relative_attack),
    Column("share", right=True, fold=False): both_shares,
    Column("of |token|", right=True, fold=False): both_in_tokens,
    Column("gap", right=True, fold=False): lambda row: shown_bound(row.gap, up=True, digits=3),
    Column("usage", right=True, fold=False): lambda row: "-" if row.usage is None else f"{row.usage:.1%}",
    Column("status", fold=False): _status,
    Column("s", right=True): lambda row: f"{(row.seconds_certify or 0.0) + (row.seconds_attack or 0.0):.2f}",
}


def result_table(rows: Sequence[Row], *, title: str | None = None) -> FittingTable:
    """One line per input: sizes, the best certificate, the attack, the gap, the status, the seconds.

    Args:
        rows: The rows, all of one command.
        title: Above the table.

    Returns:
        A rich table; columns that no row fills are left out, and on a narrow terminal names are shortened and the least
        columns go.
    """
    certified, attacked = any(r.certified_radius is not None for r in rows), any(r.attack is not None for r in rows)
    margins, network = any(r.margin is not None for r in rows), any(r.depth is not None for r in rows)
    there = {
        "text": any(r.text for r in rows),
        "layer": len({r.layer for r in rows}) > 1 and not network,
        "at": len({r.layer for r in rows}) > 1 and network,
        "class": any(r.label for r in rows),
        "of |x|": attacked and network,
        "share": not network and any(yardstick(row) for row in rows),
        "of |token|": not network and any((found := yardstick(row)) and found[1] == WHOLE for row in rows),
        "margin": margins,
        "tolerance": not margins,
        "certified": certified,
        "by": any(r.certificate for r in rows) or (certified and not network),
        "attack": attacked,
        "gap": certified and attacked,
        "usage": any(r.epsilon is not None for r in rows),
    }
    columns = [column for column in _CELLS if there.get(column.name, True)]
    lines = [[_CELLS[column](row) for column in columns] for row in rows]
    caption = _caption(rows, shares=any(column.name == "of |x|" for column in columns))
    return lay_out(columns, lines, title=title, caption=caption, steps=STEPS)


def certificate_table(rows: Sequence[Row]) -> FittingTable | None:
    """Certified radius of every certificate, the best of each input marked by a star; None if there are not two.

    Args:
        rows: The rows; up to ``MOST_COLUMNS`` inputs have a column each, more are summarised.
    """
    certified = [row for row in rows if row.certificates]
    methods = list(dict.fromkeys(name for row in certified for name in row.certificates))
    if len(methods) < 2:
        return None
    title = "certified radius by certificate (* best of its input)"
    columns = [Column("certificate", fold=False), Column("kind", fold=False)]
    if len(certified) > MOST_COLUMNS:
        summary = ("median radius", "median share of best", "best on", "rows")
        columns += [Column(name, right=True, fold=False) for name in summary]
        return lay_out(columns, [_certificate_summary(certified, method) for method in methods], title=title)
    names = _column_names([row.input_id for row in certified])
    columns += [Column(name, right=True, fold=False) for name in names]
    lines: list[tuple[str | Text, ...]] = [
        (m, _kind(certified, m), *(_certificate_cell(row, m) for row in certified)) for m in methods
    ]
    return lay_out(columns, lines, title=title)


def _certificate_summary(rows: Sequence[Row], method: str) -> tuple[str, ...]:
    having = [row for row in rows if method in row.certificates]
    radii = [row.certificates[method].radius for row in having]
    shares = [r / row.certified_radius for r, row in zip(radii, having, strict=True) if row.certified_radius]
    best = sum(row.certificate == method for row in rows)
    share = f"{statistics.median(shares):.1%}" if shares else "-"
    return method, _kind(rows, method), shown(statistics.median(radii)), share, str(best), str(len(having))


def _certificate_cell(row: Row, method: str) -> Text:
    entry = row.certificates.get(method)
    if entry is None:
        return Text("-")
    best = row.certificate == method
    return Text(
        shown_bound(entry.radius, up=False, digits=3) + ("*" if best else " "), style="bold green" if best else ""
    )


def _kind(rows: Sequence[Row], method: str) -> str:
    entry = next(row.certificates[method] for row in rows if method in row.certificates)
    return entry.kind if entry.failure_probability == 0 else f"{entry.kind} ({entry.failure_probability:.0e})"


def _column_names(identifiers: Sequence[str]) -> list[str]:
    """The part before the first dash (a line number) where that tells the inputs apart."""
    heads = [name.split("-", 1)[0] for name in identifiers]
    return [shortened(name, 10) for name in (heads if len(set(heads)) == len(heads) else identifiers)]


def _caption(rows: Sequence[Row], *, shares: bool) -> str | None:
    """Medians and what stands behind the letters; the messages of rows that failed are printed apart."""
    if not rows:
        return None
    parts = [f"threat {rows[0].threat}, goal {rows[0].goal}", *scopes(rows)]
    if rows[0].epsilon is not None:
        parts.append(f"usage: share of the goal's budget that the worst point within {shown(rows[0].epsilon)} uses")
    if shares:
        parts.append("|x|: norm of all tokens at that depth")
    measured = yardstick(rows[0])
    if measured is not None and rows[0].depth is None:
        parts.append(f"share: of {measured[1]}, certified to attack")
        if measured[1] == WHOLE and rows[0].token_norm:
            parts.append(f"of |token|: of {TOKEN}")
    gaps = [row.gap for row in rows if row.gap is not None]
    if gaps:
        parts.append(f"median gap {shown(statistics.median(gaps), 3)} over {len(gaps)} of {len(rows)} inputs")
    return "; ".join([*parts, *not_installed(rows)])


def not_installed(rows: Sequence[Row]) -> list[str]:
    """Certificates that were left out for want of a package, each once with its cure."""
    skipped = (entry for row in rows for entry in row.skipped.items())
    return list(dict.fromkeys(f"without {name}: {reason}" for name, reason in skipped if _INSTALL in reason))


SUMMARY = (
    *("layer", "threat", "goal", "rows"),
    *("median certified", "median attack", "median gap", "largest gap", "status"),
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
        certified, attacked = median(r.certified_radius for r in group), median(r.attack_radius for r in group)
        sides = (
            (certified, False, 4),
            (attacked, True, 4),
            (median(gaps), True, 4),
            (max(gaps, default=None), True, 3),
        )
        figures = [shown_bound(value, up=up, digits=digits) for value, up, digits in sides]
        ended = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        lines.append((*key, str(len(group)), *figures, ended))
    whole = bool(rows) and all(row.depth is not None for row in rows)
    return (("depth", *SUMMARY[1:]) if whole else SUMMARY), lines


def summary_table(rows: Sequence[Row]) -> FittingTable:
    """``summary_lines`` for the terminal."""
    heading, lines = summary_lines(rows)
    named = [Column(name, shared=place > 0) for place, name in enumerate(heading[:3])]
    columns = [*named, *numbers(*heading[3:-1]), *words(heading[-1])]
    caption = "; ".join([*scopes(rows), *not_installed(rows)]) or None
    return lay_out(columns, lines, title=f"{len(rows)} rows", caption=caption)


def layer_table(layers: Sequence[LayerInfo]) -> FittingTable:
    """One line per attention layer of a model.

    Args:
        layers: From ``Model.layers``.
    """
    lines = [
        (
            i.name, i.kind, _heads(i), *("-" if size is None else str(size) for size in (i.d, i.e)), _mask(i),
            _positions(i), "yes" if i.supported else f"no: {i.reason}",
        )
        for i in layers
    ]  # fmt: skip
    columns = [*words("layer", "kind"), *numbers("heads", "d", "out"), *words("mask", "positions", "supported")]
    return lay_out(columns, lines, caption=f"{sum(i.supported for i in layers)} of {len(layers)} supported")


def _heads(layer: LayerInfo) -> str:
    """Heads, and after a slash the number of different keys and values."""
    shared = "" if layer.kv_heads is None else f"/{layer.kv_heads}"
    return "-" if layer.heads is None else f"{layer.heads}{shared}"


def _mask(layer: LayerInfo) -> str:
    return layer.mask if layer.window is None else f"{layer.mask}, window {layer.window}"


def _positions(layer: LayerInfo) -> str:
    """What the scores know of positions."""
    found = (
        "" if layer.rotary is None else f"rotary ({layer.rotary})",
        "" if layer.bias is None else f"bias ({layer.bias})",
    )
    return ", ".join(part for part in found if part) or "-"
