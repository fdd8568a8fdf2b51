"""Radii in everyday units: as a share of what the threat moves, in sentences that round to the safe side."""

import re
from collections.abc import Callable, Sequence

from attnrobust.runs.rows import Row
from attnrobust.runs.yardsticks import TOKEN, WHOLE, in_tokens, proved, share, yardstick
from attnrobust.status import Status
from attnrobust.text import shown, shown_bound

_SUBJECTS = (
    (re.compile(r"frobenius(?!:)"), "move of all tokens together"),
    (re.compile(r"token:(\d+)"), "move of token {0}"),
    (re.compile(r"(?:frobenius|tokens):(\d+(?:,\d+)*)"), "move of tokens {0} together"),
    (re.compile(r"per-token"), "move of every token at once"),
    (re.compile(r"per-token:([\d,]+)"), "move of tokens {0} at once"),
    (re.compile(r"any-token"), "move of any one token"),
    (re.compile(r"any-token:([\d,]+)"), "move of any one of tokens {0}"),
)
_BROKEN = (
    (re.compile(r"displacement (\S+)"), "changes the output by {0}"),
    (re.compile(r"displacement (\S+) mean"), "changes the mean of the output by {0}"),
    (re.compile(r"displacement (\S+) row:(\d+)"), "changes the output of token {1} by {0}"),
    (re.compile(r"margin .*"), "changes the label of the readout"),
    (re.compile(r"decision.*"), "changes the model's decision"),
    (re.compile(r"nearest.*"), "changes the nearest anchor"),
    (re.compile(r"hidden (\S+).*"), "changes the last hidden states by {0}"),
    (re.compile(r"pooled (\S+).*"), "changes the mean of the last hidden states by {0}"),
)
DIGITS = 3


def safe(value: float, *, up: bool, digits: int = DIGITS) -> str:
    """A number for people that is never better than the true one: attack radii go up, certified ones down."""
    return shown_bound(value, up=up, digits=digits)


def both_shares(row: Row) -> str:
    """Certified and attack radius as shares: ``0.31% to 0.42%``; a dash for what is not there."""
    return _both(share, row)


def both_in_tokens(row: Row) -> str:
    """Both radii as shares of the median token norm: ``0.9% to 1.2%``; a dash where that is the yardstick anyway."""
    if (measured := yardstick(row)) is None or measured[1] == TOKEN:
        return "-"
    return _both(in_tokens, row)


def _both(measure: Callable[[float | None, Row], float | None], row: Row) -> str:
    sides = ((measure(proved(row), row), False), (measure(row.attack_radius, row), True))
    told = ["-" if value is None else f"{safe(100 * value, up=up)}%" for value, up in sides]
    return "-" if told == ["-", "-"] else " to ".join(told)


def scale_note(rows: Sequence[Row]) -> str | None:
    """How far the nearest other word is, to judge shares of a token's norm by; None where no row knows."""
    shares = sorted(row.word_distance for row in rows if row.word_distance is not None)
    if not shares:
        return None
    low, high = (f"{shown(100 * share, 2)}%" for share in (shares[0], shares[-1]))
    span = low if low == high else f"{low} to {high}"
    return (
        f"for scale: in the model's embedding table the nearest other word is {span} of a word's own norm away "
        "(median over an input's tokens)"
    )


def row_verdict(row: Row) -> str | None:
    """One sentence about one input; None where there is no radius to speak of."""
    if row.status == Status.MISCLASSIFIED:
        return f"{row.input_id}: the goal fails at the clean input itself, without any move"
    if row.certified_radius is None and row.attack_radius is None:
        return None
    return f"{row.input_id}: {_sentence([row])}"


def run_verdicts(rows: Sequence[Row]) -> list[str]:
    """One sentence for each layer or depth, threat and goal: what holds for every input that has a radius."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.threat, row.goal), []).append(row)
    told = []
    for (layer, _, _), group in groups.items():
        open_rows = [row for row in group if row.status != Status.MISCLASSIFIED]
        there = [row for row in open_rows if row.certified_radius is not None or row.attack_radius is not None]
        if there:
            left = f" ({_left(group, open_rows, there)})" if len(there) < len(group) else ""
            plural = "" if len(there) == 1 else "s"
            count = "the one input" if len(group) == 1 else f"all {len(there)} input{plural}{left}"
            told.append(f"{layer}, {count}: {_sentence(there)}")
    return told


def _left(group: Sequence[Row], open_rows: Sequence[Row], there: Sequence[Row]) -> str:
    """What is not in the sentence of a run, and why."""
    without, failing = len(open_rows) - len(there), len(group) - len(open_rows)
    parts = [f"{without} more have no radius"] if without else []
    return "; ".join(parts + ([f"the goal of {failing} more fails without any move"] if failing else []))


def _sentence(rows: Sequence[Row]) -> str:
    """No move below the smallest certified size breaks the goal; the smallest that was found to."""
    subject, broken = _subject(rows[0].threat), _broken(rows[0].goal)
    certified = [row.certified_radius for row in rows if row.certified_radius is not None]
    attacked = [row for row in rows if row.attack_radius is not None]
    found = min(attacked, key=_size(attacked), default=None)
    parts = []
    if len(certified) == len(rows) and min(certified) > 0:
        least = min(rows, key=_size(rows, certified=True))
        doubt = " (probabilistic)" if any(row.certificate_kind == "probabilistic" for row in rows) else ""
        parts.append(f"no {subject} below {_told(least, up=False)} {broken}{doubt}")
    elif certified:
        parts.append(f"nothing is certified against a {subject} that {broken}")
    if found is not None and parts:
        parts.append(f"{_told(found, up=True)} was found to")
    elif found is not None:
        parts.append(f"a {subject} of {_told(found, up=True)} was found that {broken}")
    elif any(row.attack is not None for row in rows):
        parts.append("no violation was found")
    return "; ".join(parts)


def _size(rows: Sequence[Row], *, certified: bool = False) -> Callable[[Row], float]:
    """Key of a row by its radius; as a share where every row has a yardstick, else as it is."""
    shares = all(yardstick(row) is not None for row in rows)

    def key(row: Row) -> float:
        radius = row.certified_radius if certified else row.attack_radius
        value = share(radius, row) if shares else radius
        return float("inf") if value is None else value

    return key


def _told(row: Row, *, up: bool) -> str:
    """A radius in its everyday unit, or as a size where there is none."""
    radius = (row.attack_radius if up else row.certified_radius) or 0.0
    measured = yardstick(row)
    if measured is None:
        return f"size {safe(radius, up=up)}"
    told = f"{safe(100 * radius / measured[0], up=up)}% of {measured[1]}"
    multiple = in_tokens(radius, row) if measured[1] == WHOLE else None
    return told if multiple is None else f"{told} ({safe(100 * multiple, up=up)}% of {TOKEN})"


def _subject(threat: str) -> str:
    for pattern, words in _SUBJECTS:
        if match := pattern.fullmatch(threat):
            return words.format(*match.groups())
    return f"change within {threat}"


def _broken(goal: str) -> str:
    for pattern, words in reversed(_BROKEN):
        if match := pattern.fullmatch(goal):
            return words.format(*match.groups())
    return f"breaks the goal {goal}"
