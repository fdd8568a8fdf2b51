"""Every token's own attack radius, for the terminal."""

from collections.abc import Sequence

from attnrobust.reports.layout import Column, FittingTable, lay_out, numbers
from attnrobust.runs.heat import is_special
from attnrobust.runs.rows import Row
from attnrobust.text import shortened, shown_bound

MOST_TOKENS, MOST_INPUTS = 12, 4
"""Tokens of a table, and inputs with a table each."""
LONGEST_TOKEN = 24
SPECIAL = "special token"


def token_tables(rows: Sequence[Row]) -> list[FittingTable]:
    """A table for each of the first inputs whose tokens were attacked alone; empty where none was."""
    return [token_table(row) for row in rows if row.token_radii][:MOST_INPUTS]


def token_table(row: Row) -> FittingTable:
    """The tokens of an input by the attack radius of each alone, the most vulnerable first.

    Args:
        row: A row with ``token_radii``.
    """
    known = [place for place, radius in enumerate(row.token_radii) if radius is not None]
    ranked = sorted(known, key=lambda place: row.token_radii[place] or 0.0)
    lines = [_line(row, place) for place in ranked[:MOST_TOKENS]]
    columns = [*numbers("place"), Column("token", fold=False), *numbers("radius", "of |token|"), Column("", fold=False)]
    return lay_out(columns, lines, title=_title(row, len(known)), caption=_caption(row, ranked))


def _line(row: Row, place: int) -> tuple[str, ...]:
    text, radius = row.tokens[place] if place < len(row.tokens) else "-", row.token_radii[place] or 0.0
    share = f"{shown_bound(100.0 * radius / row.token_norm, up=True, digits=3)}%" if row.token_norm else "-"
    mark = SPECIAL if is_special(text) else ""
    return str(place), shortened(text, LONGEST_TOKEN), shown_bound(radius, up=True), share, mark


def _title(row: Row, known: int) -> str:
    count = f"the {MOST_TOKENS} smallest of {known}" if known > MOST_TOKENS else "smallest first"
    return f"{row.input_id}, {row.layer}: attack radius of each token alone, {count}"


def _caption(row: Row, ranked: Sequence[int]) -> str | None:
    parts = []
    if row.token_norm:
        parts.append("|token|: median norm of the tokens")
    if len(ranked) < row.n:
        parts.append(f"{row.n - len(ranked)} tokens may not move, or nothing was found for them")
    if len(ranked) > MOST_TOKENS:
        parts.append("all are in --json and in the report's heat map")
    return "; ".join(parts) or None
