"""One row per input: what tables, files and plots show."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attnrobust.errors import InputError
from attnrobust.status import Status
from attnrobust.text import natural_order

SCHEMA_VERSION = 1
"""Version of the row fields; raised when a field changes its meaning or goes away."""


LISTS = ("tokens", "token_moves", "token_radii")
"""Fields with one entry per token."""

MOVE_AT = "; the tokens move at "
"""Between what a goal about a whole model asks and the depth, in ``Row.goal_scope``."""


@dataclass(frozen=True)
class CertificateEntry:
    """One certificate in a row: radius, kind, failure probability, seconds."""

    radius: float
    kind: str
    failure_probability: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """The result for one input; None stands for "not there" (not run, none found, or no finite value).

    Args:
        input_id: The input's name.
        layer: The layer's name; of a whole model the depth at which its tokens move.
        n: Number of tokens.
        threat: The threat's key; radii are in its distance, in units of the token vectors.
        goal: The goal's key.
        tolerance: Allowed displacement, absolute; None for a margin.
        margin: Smallest clean margin over the classes; None for a displacement.
        certificate: Name of the best certificate.
        certificate_kind: Its kind.
        certified_radius: Its radius, a lower bound of the robust radius; 0 where nothing is certified.
        attack: Name of the attack.
        attack_radius: Verified radius, an upper bound of the robust radius; None if no violation was found.
        status: A ``Status``.
        gap: attack_radius / certified_radius; None where ``Comparison.gap`` is infinite.
        seconds_certify: Wall time of all certificates.
        seconds_attack: Wall time of the attack.
        seed: Seed of the run; ``compare(problem, seed=seed)`` repeats the row.
        certificates: Every certificate by name.
        skipped: Certificates that do not apply, with their reason.
        epsilon: Fixed budget of the attack, if one was given.
        usage: Used share of the goal's budget at the attack's point (a violation has >= 1).
        queries: Forward evaluations of the attack.
        message: What went wrong (statuses error, misclassified, unsound), or why nothing is certified.
        problem: Digest of the problem.
        text: The sentence.
        tokens: The token strings.
        token_moves: l2 norm of each token's move in the attack's point.
        input_norm: Frobenius norm of the clean tokens, to judge radii by.
        row_id: Digest that names the row in a run of many; None elsewhere.
        goal_scope: What the goal is about, in words, where its name may suggest more (a readout of a layer), and of a
            whole model always; else None.
        label: Name of the class that must stay, of a goal about a whole model that has classes; else None.
        attack_label: Name of the class at the attack's point; None where it found none.
        token_radii: Attack radius of every token that moves alone, where it was asked for: None for a token that may
            not move or whose attack found nothing; else empty.
        token_norm: Median l2 norm of the clean tokens, to judge the radii of single tokens by.
        word_distance: Of a text: median over its tokens of the distance to the nearest other word in the model's table
            of embeddings, as a share of the token's norm there; None without such a table.
    """

    input_id: str
    layer: str
    n: int
    threat: str
    goal: str
    tolerance: float | None = None
    margin: float | None = None
    certificate: str | None = None
    certificate_kind: str | None = None
    certified_radius: float | None = None
    attack: str | None = None
    attack_radius: float | None = None
    status: str = Status.ERROR
    gap: float | None = None
    seconds_certify: float | None = None
    seconds_attack: float | None = None
    seed: int = 0
    certificates: dict[str, CertificateEntry] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    usage: float | None = None
    queries: int | None = None
    message: str | None = None
    problem: str | None = None
    text: str | None = None
    tokens: tuple[str, ...] = ()
    token_moves: tuple[float, ...] = ()
    input_norm: float | None = None
    row_id: str | None = None
    goal_scope: str | None = None
    label: str | None = None
    attack_label: str | None = None
    token_radii: tuple[float | None, ...] = ()
    token_norm: float | None = None
    word_distance: float | None = None

    @property
    def depth(self) -> int | None:
        """The place of the depth in its model (the embeddings are 0); None of a row about a layer."""
        return None if self.goal_scope is None or MOVE_AT not in self.goal_scope else depth_place(self.layer)

    @property
    def relative_attack(self) -> float | None:
        """Attack radius as a share of the norm of the clean tokens."""
        return _share(self.attack_radius, self.input_norm)

    @property
    def relative_certified(self) -> float | None:
        """Certified radius as a share of the norm of the clean tokens."""
        return _share(self.certified_radius, self.input_norm)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and Parquet, in the order of the fields."""
        return asdict(self) | {name: list(getattr(self, name)) for name in LISTS}


def without_times(rows: Iterable[Row]) -> list[Row]:
    """Rows without their seconds: equal for two runs with the same inputs and options."""
    return [
        replace(
            row,
            seconds_certify=None,
            seconds_attack=None,
            certificates={name: replace(entry, seconds=0.0) for name, entry in row.certificates.items()},
        )
        for row in rows
    ]


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """The row that ``Row.as_dict`` (or one line of ``--json``) describes; unknown fields are an error."""
    known = set(Row.__dataclass_fields__)
    values = {name: value for name, value in values.items() if name != "units"}  # derived, see runs.yardsticks
    if foreign := sorted(set(values) - known):
        raise InputError(f"unknown row fields: {', '.join(foreign)}")
    entries = {name: CertificateEntry(**entry) for name, entry in dict(values.get("certificates") or {}).items()}
    lists = {name: tuple(values.get(name) or ()) for name in LISTS}
    return Row(**(dict(values) | lists | {"certificates": entries, "skipped": dict(values.get("skipped") or {})}))


def median(values: Iterable[float | None]) -> float | None:
    """Median of the numbers that are there, or None."""
    there = [value for value in values if value is not None]
    return float(statistics.median(there)) if there else None


def scopes(rows: Iterable[Row]) -> list[str]:
    """What the goals of rows are about, each once, where their names may suggest more; depths are joined."""
    depths: dict[str, list[str]] = {}
    for row in rows:
        if row.goal_scope is not None:
            about, between, depth = row.goal_scope.partition(MOVE_AT)
            depths.setdefault(about + between, []).append(depth)
    return [about + ", ".join(sorted(set(found), key=depth_place)) for about, found in depths.items()]


def depth_place(name: str) -> int:
    """The place of a depth in its model: what enters block K has K, the embeddings 0, an input before them -1."""
    kind, _, number = name.partition(":")
    return int(number) if number.isdecimal() else 0 if kind == "embeddings" else -1


def layer_order(row: Row) -> list[tuple[int, str]]:
    """Sorting key of a row's layer or depth."""
    return natural_order(row.layer) if row.depth is None else [(row.depth, "")]


def _share(radius: float | None, norm: float | None) -> float | None:
    return radius / norm if radius is not None and norm else None
