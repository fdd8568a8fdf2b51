"""What a report says about its certificates: what each is, where it is from, and why others have no radius."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.runs.rows import Row

KINDS = {
    "float64": "proved for real numbers and computed in float64",
    "rigorous": "every rounding error is inside",
    "probabilistic": "wrong with at most the stated probability",
}


@dataclass(frozen=True)
class Explained:
    """One certificate of a report.

    Args:
        name: Its name.
        about: One line on what it does; empty of one that this version does not know.
        kind: Its kind in words.
        reference: Where it is from.
        rows: In how many rows it has a radius.
        best: In how many its radius is the largest.
    """

    name: str
    about: str
    kind: str
    reference: str
    rows: int
    best: int


def explained(rows: Sequence[Row]) -> list[Explained]:
    """Every certificate that has a radius in a row, those first that are the best most often."""
    known = {method.name: method for method in (*METHODS, *ON_REQUEST)}
    having = Counter(name for row in rows for name in row.certificates)
    best = Counter(row.certificate for row in rows)
    kinds = {name: entry.kind for row in rows for name, entry in row.certificates.items()}
    found = []
    for name, count in having.items():
        method = known.get(name)
        about = "" if method is None else (type(method).__doc__ or "").strip().splitlines()[0].replace("``", "")
        kind = f"{kinds[name]}: {KINDS.get(kinds[name], '')}".removesuffix(": ")
        reference = "" if method is None else method.reference
        found.append(Explained(name, about, kind, reference, count, best[name]))
    return sorted(found, key=lambda one: (-one.best, -one.rows, one.name))


def why_not(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Certificates without a radius: name, reason, in how many rows; those that speak of other layers are left out."""
    reasons = Counter((name, reason) for row in rows for name, reason in row.skipped.items())
    return [(name, reason, count) for (name, reason), count in reasons.most_common() if not _foreign(reason)]


def _foreign(reason: str) -> bool:
    return reason.startswith(("it speaks about", "it does not cover"))
