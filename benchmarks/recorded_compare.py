"""Two records beside each other: every field that differs, by how much, and which way a radius went."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]

SECTIONS = ("problems", "functions", "commands")
DIGESTS = frozenset({"digest", "problem", "row_id"})
WORDS = frozenset({"message", "note", "reason", "reference", "region", "conditions", "where"})
"""Fields of prose; what names a certificate that was skipped holds its reason."""
IDENTITIES = (
    *(("input_id",), ("input_id", "goal"), ("input_id", "threat", "goal"), ("input", "layer_name")),
    *(("quantity", "name"), ("quantity", "name", "where"), ("method",), ("attack",), ("layer", "head"), ("layer",)),
)
"""Fields that tell the entries of a list apart, tried in order; so an entry that is added does not shift the others."""
MISSING = object()


@dataclass(frozen=True)
class Difference:
    """One field of one entry.

    Args:
        entry: Section and name.
        field: Path of the field in the entry.
        old: Value before; ``MISSING`` if there was none.
        new: Value after; ``MISSING`` if there is none.
    """

    entry: Path
    field: Path
    old: Any
    new: Any

    @property
    def kind(self) -> str:
        """What differs: a certified radius, an attack radius, another number, another value, words, a digest."""
        if self.field and self.field[-1] in DIGESTS:
            return "digest"
        if self.old is MISSING or self.new is MISSING:
            return "added" if self.old is MISSING else "missing"
        if WORDS & set(self.field[-2:]):
            return "words"
        if "skipped" in self.field[-2:-1]:
            return "words"
        if not (_is_number(self.old) and _is_number(self.new)):
            return "value"
        return self._radius or "number"

    @property
    def _radius(self) -> str | None:
        last = self.field[-1]
        if last == "certified_radius" or (last == "radius" and "certificates" in self.field):
            return "certified radius"
        # a command's own "radius" is that of a ball which was asked for
        attacked = last == "attack_radius" or (last == "radius" and self.entry[0] != "commands")
        return "attack radius" if attacked else None

    @property
    def relative(self) -> float:
        """(new - old) / |old|; infinity where the old number is 0 or one of them is not finite."""
        change = self.new - self.old
        return change / abs(self.old) if self.old and math.isfinite(change) else math.copysign(math.inf, change)

    def __str__(self) -> str:
        start = f"{' / '.join(self.entry)}: {'.'.join(self.field) or '(all)'}"
        kind = self.kind
        if kind in ("certified radius", "attack radius", "number"):
            way = "up" if self.new > self.old else "down" if self.new < self.old else "not a number"
            name = "" if kind == "number" else f"{kind} "
            return f"{start} {self.old!r} -> {self.new!r} ({self.relative:+.3e}, {name}{way})"
        return f"{start} {_short(self.old)} -> {_short(self.new)} ({kind})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if value is MISSING:
        return "(none)"
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf by its path, without times; an empty container is a leaf."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = [(key, entry) for key, entry in value.items() if not key.startswith("seconds")]
    elif isinstance(value, list):
        inner = list(zip(labels(value), value, strict=True))
    if not inner:
        yield path, value
    for key, entry in inner:
        yield from leaves(entry, (*path, key))


def labels(entries: list[Any]) -> list[str]:
    """What tells the entries of a list apart: fields that name them, else their places."""
    for fields in IDENTITIES:
        if all(isinstance(entry, dict) and all(field in entry for field in fields) for entry in entries):
            names = [" ".join(str(entry[field]) for field in fields) for entry in entries]
            if len(set(names)) == len(names):
                return names
    return [str(place) for place in range(len(entries))]


def same(old: Any, new: Any) -> bool:
    """Equal to the last bit; NaN equals NaN, and 0 differs from -0."""
    if isinstance(old, float) and isinstance(new, float):
        return old.hex() == new.hex()
    return type(old) is type(new) and bool(old == new)


def matching(record: dict[str, Any], text: str) -> dict[str, Any]:
    """The entries of a record whose name holds the text."""
    chosen = {section: record.get(section, {}) for section in SECTIONS}
    return {section: {name: entry for name, entry in part.items() if text in name} for section, part in chosen.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Difference]:
    """Every field that differs, digests and words included."""
    for section in SECTIONS:
        before, after = old.get(section, {}), new.get(section, {})
        for name in [*before, *(name for name in after if name not in before)]:
            entry = (section, name)
            if name not in before or name not in after:
                yield Difference(entry, (), before.get(name, MISSING), after.get(name, MISSING))
                continue
            yield from _fields(entry, dict(leaves(before[name])), dict(leaves(after[name])))


def _fields(entry: Path, before: dict[Path, Any], after: dict[Path, Any]) -> Iterator[Difference]:
    for field in [*before, *(field for field in after if field not in before)]:
        old, new = before.get(field, MISSING), after.get(field, MISSING)
        if not same(old, new) and not _told_already(field, before, after):
            yield Difference(entry, field, old, new)


def _told_already(field: Path, before: dict[Path, Any], after: dict[Path, Any]) -> bool:
    """Whether the same number, not written by hex, says it."""
    plain = (*field[:-1], field[-1].removesuffix("_hex")) if field else field
    return plain != field and not same(before.get(plain, MISSING), after.get(plain, MISSING))


def summary(found: list[Difference], old: dict[str, Any]) -> list[str]:
    """How many of each kind, and the largest change of the radii each way."""
    sizes = ", ".join(f"{len(old.get(section, {}))} {section}" for section in SECTIONS)
    lines = [f"{len({d.entry for d in found})} entries differ of {sizes}; {len(found)} fields"]
    for kind in ("certified radius", "attack radius"):
        changes = [d.relative for d in found if d.kind == kind and not math.isnan(d.relative)]
        for way, chosen in (("up", [c for c in changes if c > 0]), ("down", [c for c in changes if c < 0])):
            if chosen:
                lines.append(f"  {len(chosen)} x {kind} {way}, at most {max(map(abs, chosen)):.3e}")
    for kind in ("number", "value", "words", "digest", "missing", "added"):
        count = sum(d.kind == kind for d in found)
        if count:
            lines.append(f"  {count} x {kind}")
    return lines
