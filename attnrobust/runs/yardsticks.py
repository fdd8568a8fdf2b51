"""What radii are compared with so that they say something: the norm of the input, or of a token, the next word."""

import re

from attnrobust.runs.rows import Row
from attnrobust.status import Status

WHOLE, TOKEN = "the input's norm", "the median token norm"

_WHOLE = re.compile(r"frobenius(:\d+(,\d+)*)?|tokens:\d+(,\d+)*")
"""Threats that bound all moves together in l2."""
_EACH = re.compile(r"token:\d+|(per-token|any-token)(:\d+(,\d+)*)?")
"""Threats that bound each token's move in l2."""


def yardstick(row: Row) -> tuple[float, str] | None:
    """The norm that the threat's radii are compared with, and its name; None where none has the same unit.

    Threats that bound all tokens together have the norm of all of them, those that bound each token in l2 the median
    norm of one; other norms (linf, l1), measures and copies have none.
    """
    norm, name = (row.input_norm, WHOLE) if _WHOLE.fullmatch(row.threat) else (row.token_norm, TOKEN)
    return (norm, name) if norm and moves_in_l2(row) else None


def moves_in_l2(row: Row) -> bool:
    """Whether the threat's radii are l2 norms of moves, so that a token's norm is in their unit."""
    return bool(_WHOLE.fullmatch(row.threat) or _EACH.fullmatch(row.threat))


def proved(row: Row) -> float | None:
    """The certified radius; None where nothing certified one, which the row itself keeps as 0."""
    nothing = row.certificate is None and row.status != Status.MISCLASSIFIED and not row.certified_radius
    return None if nothing else row.certified_radius


def share(radius: float | None, row: Row) -> float | None:
    """A radius as a share of the row's yardstick."""
    measured = yardstick(row)
    return None if radius is None or measured is None else radius / measured[0]


def in_tokens(radius: float | None, row: Row) -> float | None:
    """A radius as a multiple of the median token norm; None of threats in other units."""
    return radius / row.token_norm if radius is not None and row.token_norm and moves_in_l2(row) else None


def in_words(radius: float | None, row: Row) -> float | None:
    """A radius over the median token norm, in distances to the nearest other word over a word's norm.

    Both are ratios, since the embedding table and the tokens at a depth are in different units: 0.1 says that the move
    is, against a token, a tenth of what the nearest other word is against a word of the table.
    """
    multiple = in_tokens(radius, row)
    return multiple / row.word_distance if multiple is not None and row.word_distance else None


def as_json(row: Row) -> dict[str, object]:
    """The row for JSON: its fields, and under ``units`` its radii by every yardstick."""
    sides = {"certified": row.certified_radius, "attack": row.attack_radius}
    of_input = {"certified": row.relative_certified, "attack": row.relative_attack}
    found: dict[str, float | None] = {}
    for side, radius in sides.items():
        found[f"{side}_of_input_norm"] = of_input[side] if moves_in_l2(row) else None
        found[f"{side}_of_token_norm"] = in_tokens(radius, row)
        found[f"{side}_of_nearest_word"] = in_words(radius, row)
    return row.as_dict() | {"units": found}
