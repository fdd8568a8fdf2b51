"""A threshold on the rows of a run, for continuous integration."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree as ET

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.reports.units import safe
from attnrobust.runs.rows import Row, scopes
from attnrobust.runs.yardsticks import TOKEN, in_tokens, in_words, share, yardstick
from attnrobust.status import Kind, Status
from attnrobust.text import shown

SHARES: Mapping[str, tuple[str, Callable[[float | None, Row], float | None]]] = {
    "norm": ("", share), "token": (TOKEN, in_tokens), "word": ("the way to the nearest other word", in_words),
}  # fmt: skip
"""What a threshold may be a share of: its name (empty: that of the row's yardstick), and how it is measured."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the rows must reach.

    Args:
        min_certified: Least certified radius.
        min_share: Least certified radius as a share of what ``share_of`` names.
        share_of: "norm" (the row's yardstick, see ``attnrobust.runs.yardsticks``), "token" (the median token norm) or
            "word" (the distance to the nearest other word of the embedding table, both relative to a norm).
        max_gap: Largest gap; a row without a gap (nothing certified, or no violation found) falls short, because a
            search that finds nothing measures nothing.
        quantile: Share of the rows that may fall short, in [0, 1): 0 asks every row.
    """

    min_certified: float | None = None
    max_gap: float | None = None
    quantile: float = 0.0
    min_share: float | None = None
    share_of: str = "norm"

    def __post_init__(self) -> None:
        if self.min_certified is None and self.max_gap is None and self.min_share is None:
            raise InputError("nothing to check; give --min-certified R, --max-gap G, or both")
        if self.share_of not in SHARES:
            raise UnknownNameError("unit of a share", self.share_of, SHARES)
        if self.min_share is not None and not self.min_share >= 0:
            raise InputError(f"min-certified must be a share >= 0%; got {self.min_share:.3%}")
        if self.min_certified is not None and not self.min_certified >= 0:
            raise InputError(f"min-certified must be a number >= 0; got {self.min_certified}")
        if self.max_gap is not None and not self.max_gap >= 1:
            raise InputError(f"max-gap must be a number >= 1; got {self.max_gap}")
        if not 0.0 <= self.quantile < 1.0:
            raise InputError(f"quantile must be in [0, 1); got {self.quantile}")


@dataclass(frozen=True)
class Verdict:
    """How the rows of a run stand against the thresholds.

    Args:
        rows: The rows.
        shortfalls: For each row why it falls short; empty if it does not.
        allowed: How many rows may fall short.
        missing: Rows of the run that are not computed yet.
    """

    rows: Sequence[Row]
    shortfalls: Sequence[str]
    allowed: int
    missing: int

    @property
    def fallen(self) -> int:
        """How many rows fall short."""
        return sum(bool(shortfall) for shortfall in self.shortfalls)

    @property
    def unsound(self) -> int:
        """How many rows are unsound; no threshold excuses one."""
        return sum(row.status == Status.UNSOUND for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether the run is complete, sound, and few enough rows fall short."""
        return self.unsound == 0 and self.missing == 0 and bool(self.rows) and self.fallen <= self.allowed


def of_kinds(rows: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """The rows as if certificates of these kinds alone had been run.

    Args:
        rows: The rows.
        kinds: Of "float64", "rigorous", "probabilistic"; empty leaves the rows as they are.

    Raises:
        UnknownNameError: Another kind.
    """
    for kind in kinds:
        if kind not in list(Kind):
            raise UnknownNameError("kind of certificate", kind, Kind)
    return [_of_kinds(row, kinds) for row in rows] if kinds else list(rows)


def _of_kinds(row: Row, kinds: Sequence[str]) -> Row:
    """One row; what is not certified by these kinds counts as 0, like any row that nothing certifies."""
    if row.certified_radius is None or row.status == Status.MISCLASSIFIED:
        return row
    left = {name: entry for name, entry in row.certificates.items() if entry.kind in kinds}
    best = max(left, key=lambda name: left[name].radius, default=None)
    if best is not None and best == row.certificate:
        return replace(row, certificates=left)
    radius = 0.0 if best is None else left[best].radius
    gap = row.attack_radius / radius if row.attack_radius is not None and radius > 0 else None
    kind = None if best is None else left[best].kind
    return replace(row, certificates=left, certificate=best, certificate_kind=kind, certified_radius=radius, gap=gap)


def judge(rows: Sequence[Row], thresholds: Thresholds, *, planned: int | None = None) -> Verdict:
    """Judge every row.

    A row with an error, a timeout or NaN falls short of everything.

    Args:
        rows: The rows.
        thresholds: What they must reach.
        planned: Number of rows of the complete run; None means that these are all.
    """
    shortfalls = [_shortfall(row, thresholds) for row in rows]
    allowed = math.floor(thresholds.quantile * len(rows) + 1e-9)  # 0.1 * 30 is 3, also in floating point
    return Verdict(rows, shortfalls, allowed, 0 if planned is None else max(0, planned - len(rows)))


def _shortfall(row: Row, thresholds: Thresholds) -> str:
    if row.status == Status.UNSOUND:
        return f"unsound: {row.message}"
    if row.status in (Status.ERROR, Status.TIMEOUT, Status.NAN, Status.DISAGREES):
        return f"{row.status}: {row.message or 'no result'}"
    reasons = []
    least, most = thresholds.min_certified, thresholds.max_gap
    if least is not None and (row.certified_radius is None or row.certified_radius < least):
        reasons.append(f"certified radius {shown(row.certified_radius)} is below {least:g}")
    if thresholds.min_share is not None:
        reasons += _below_share(row, thresholds.min_share, thresholds.share_of)
    if most is not None and row.gap is None:
        reasons.append(f"the gap is unknown ({row.status.replace('_', ' ')})")
    elif most is not None and row.gap is not None and row.gap > most:
        reasons.append(f"gap {shown(row.gap)} is above {most:g}")
    return "; ".join(reasons)


def _below_share(row: Row, least: float, of: str) -> list[str]:
    name, measure = SHARES[of]
    if measure(1.0, row) is None:
        what = f"the threat {row.threat} has no" if of != "word" or row.word_distance else "the row knows no"
        return [f"{what} {(name or 'norm').removeprefix('the ')} to take a share of; give --min-certified a number"]
    value = measure(row.certified_radius, row)
    if value is not None and value >= least:
        return []
    told = "-" if value is None else f"{safe(100 * value, up=False)}%"
    measured = yardstick(row)
    return [f"certified radius {told} of {name or (measured and measured[1])} is below {100 * least:g}%"]


def worst(verdict: Verdict, count: int) -> list[str]:
    """The rows that fall short, those first that are furthest from anything certified.

    Args:
        verdict: From ``judge``.
        count: Most lines.
    """
    fallen = [(row, why) for row, why in zip(verdict.rows, verdict.shortfalls, strict=True) if why]
    fallen.sort(key=lambda pair: _badness(pair[0]))
    lines = [f"{row.input_id}, {row.layer}, {row.threat}, {row.goal}: {why}" for row, why in fallen[:count]]
    return lines + ([f"and {len(fallen) - count} more"] if len(fallen) > count else [])


def _badness(row: Row) -> tuple[bool, float, float]:
    """Sorting key: unsound rows, then the smallest certified radius, then the largest gap."""
    value = share(row.certified_radius, row)
    radius = (row.certified_radius or 0.0) if value is None else value
    return row.status != Status.UNSOUND, radius, -(math.inf if row.gap is None else row.gap)


def junit_xml(verdict: Verdict, *, name: str) -> str:
    """The verdict as JUnit XML: one test case a row, and one for the run as a whole.

    Rows that fall short within the allowed quantile are reported as skipped with their reason, so that a CI server
    shows them without failing; beyond it they are failures. Unsound rows are errors always.

    Args:
        verdict: From ``judge``.
        name: Name of the suite.
    """
    over = verdict.fallen > verdict.allowed
    suite = ET.Element("testsuite", name=_xml(name), tests=str(len(verdict.rows) + 1), errors=str(verdict.unsound))
    properties = [("goal scope", scope) for scope in scopes(verdict.rows)]
    if properties:
        held = ET.SubElement(suite, "properties")
        for key, value in properties:
            ET.SubElement(held, "property", name=key, value=_xml(value))
    for row, shortfall in zip(verdict.rows, verdict.shortfalls, strict=True):
        seconds = (row.seconds_certify or 0.0) + (row.seconds_attack or 0.0)
        case = ET.SubElement(
            suite, "testcase", classname=_xml(f"{row.layer} {row.threat} {row.goal}"), name=_xml(row.input_id),
            time=f"{seconds:.3f}",
        )  # fmt: skip
        if row.status == Status.UNSOUND:
            ET.SubElement(case, "error", type="unsound", message=_xml(shortfall))
        elif shortfall:
            ET.SubElement(case, "failure" if over else "skipped", message=_xml(shortfall))
    whole = ET.SubElement(suite, "testcase", classname="run", name="complete and within the thresholds", time="0")
    if not verdict.passed:
        ET.SubElement(whole, "failure", message=_xml(summary(verdict)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def summary(verdict: Verdict) -> str:
    """The verdict in one line."""
    parts = [f"{verdict.fallen} of {len(verdict.rows)} rows fall short, {verdict.allowed} may"]
    if verdict.unsound:
        parts.append(f"{verdict.unsound} are UNSOUND")
    if verdict.missing:
        parts.append(f"{verdict.missing} are not computed yet")
    if not verdict.rows:
        parts.append("there are no rows")
    parts += scopes(verdict.rows)
    return ("passed: " if verdict.passed else "failed: ") + "; ".join(parts)


def _xml(text: str) -> str:
    """Text with a question mark for every character that XML 1.0 cannot hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
