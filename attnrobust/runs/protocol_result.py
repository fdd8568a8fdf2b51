"""The result of a protocol as one JSON document with a digest, and how it is read again.

The digest shows that a file was edited or cut. It is no authentication: whoever edits a file can compute a new one.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.protocol import PROTOCOLS, Protocol
from attnrobust.runs.rows import Row
from attnrobust.runs.run import Outcome
from attnrobust.runs.sources import Source, source_digest
from attnrobust.runs.storage.files import json_text, versions
from attnrobust.runs.yardsticks import proved, yardstick
from attnrobust.status import Status

FORMAT = 1
"""Version of the document's layout."""

MEASURED = ("protocol", "model", "layers", "inputs", "configuration", "rows", "summary")
"""What the digest of the results is about: two runs of the same have the same, whatever the versions."""

FAILED = frozenset({Status.ERROR, Status.TIMEOUT, Status.NAN, Status.DISAGREES})


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of canonical JSON: sorted keys, no spaces, ASCII, neither NaN nor infinity."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def protocol_document(
    protocol: Protocol, model: str, sources: Sequence[Source], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The document of a complete run.

    Args:
        protocol: What was measured.
        model: The model's name as it is shown.
        sources: The inputs.
        outcomes: Of each of the protocol's attacks, in its order.

    Raises:
        InputError: Rows are left, or the runs are not about the same model and inputs.
    """
    meanings = [outcome.store.manifest.meaning for outcome in outcomes]
    first = outcomes[0].store.manifest
    by_attack = [outcome.store.rows() for outcome in outcomes]
    if any(len(rows) != o.store.manifest.rows for rows, o in zip(by_attack, outcomes, strict=True)):
        raise InputError("rows are left; give the same command again before a result is made")
    if len({(m["model"], m["inputs"]) for m in meanings}) != 1:
        raise InputError("the model or the inputs changed between the attacks; choose another --out")
    rows = joined_rows([attack.name for attack in protocol.attacks], by_attack)
    values: dict[str, Any] = {
        "format": FORMAT,
        "protocol": protocol.as_dict(),
        "model": {"name": model, "digest": meanings[0]["model"]},
        "layers": list(first.layers),
        "inputs": {
            "digest": meanings[0]["inputs"],
            "each": [{"id": source.id, "digest": source_digest(source)} for source in sources],
        },
        "configuration": digest_of({"runs": [outcome.store.manifest.digest for outcome in outcomes]}),
        "rows": rows,
        "summary": summary(rows, protocol.sizes),
    }
    found = versions()
    values["results"] = digest_of({name: values[name] for name in MEASURED})
    values["versions"] = {name: found[name] for name in ("attnrobust", "torch", "python")}
    return values | {"digest": digest_of(values)}


def joined_rows(names: Sequence[str], by_attack: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """One line for each input, layer, threat and goal, from the rows of every attack; the first have certificates."""
    others = [{row.row_id: row for row in rows} for rows in by_attack]
    return [_joined(row, {n: rows[row.row_id] for n, rows in zip(names, others, strict=True)}) for row in by_attack[0]]


def _joined(row: Row, attacked: Mapping[str, Row]) -> dict[str, Any]:
    radii = {name: one.attack_radius for name, one in attacked.items() if one.attack_radius is not None}
    best = min(radii, key=lambda name: radii[name], default=None)
    radius, certified = None if best is None else radii[best], proved(row)
    measured = yardstick(row)
    inside = radius is not None and certified is not None and radius < certified
    unsound = inside or any(one.status == Status.UNSOUND for one in attacked.values())
    return {
        "input": row.input_id,
        "layer": row.layer,
        "threat": row.threat,
        "goal": row.goal,
        "n": row.n,
        "problem": row.problem,
        "norm": None if measured is None else measured[0],
        "certified_radius": certified,
        "certificate": row.certificate,
        "certificate_kind": row.certificate_kind,
        "attack_radius": radius,
        "attack": best,
        "gap": radius / certified if radius is not None and certified else None,
        "unsound": unsound,
        "certificates": {
            name: {"radius": entry.radius, "kind": str(entry.kind), "failure_probability": entry.failure_probability}
            for name, entry in row.certificates.items()
        },
        "attacks": {
            name: {"radius": one.attack_radius, "status": str(one.status), "queries": one.queries}
            for name, one in attacked.items()
        },
    }


def summary(rows: Sequence[Mapping[str, Any]], sizes: Sequence[float]) -> list[dict[str, Any]]:
    """Medians and shares for each layer, threat and goal, over all inputs.

    An input without a certified radius counts as 0, one without a violation as infinite, and so does the gap of either;
    a median that is infinite is None. Radii are shares of the norm that the threat's radii are compared with.

    Args:
        rows: Those of the document.
        sizes: Where certified, undecided and broken inputs are counted, as such shares.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["threat"], row["goal"]), []).append(row)
    return [
        {"layer": layer, "threat": threat, "goal": goal} | _summed(group, sizes)
        for (layer, threat, goal), group in groups.items()
    ]


def _summed(rows: Sequence[Mapping[str, Any]], sizes: Sequence[float]) -> dict[str, Any]:
    certified = [_share(row, "certified_radius", 0.0) for row in rows]
    attacked = [_share(row, "attack_radius", math.inf) for row in rows]
    pairs = list(zip(certified, attacked, strict=True))
    return {
        "inputs": len(rows),
        "failed": sum(any(one["status"] in FAILED for one in row["attacks"].values()) for row in rows),
        "unsound": sum(row["unsound"] for row in rows),
        "median_certified": _median(certified),
        "median_attack": _median(attacked),
        "median_gap": _median(math.inf if row["gap"] is None else row["gap"] for row in rows),
        "at": [
            {
                "size": size,
                "certified": sum(c >= size for c, _ in pairs) / len(pairs),
                "undecided": sum(c < size < a for c, a in pairs) / len(pairs),
                "broken": sum(a <= size for _, a in pairs) / len(pairs),
            }
            for size in sizes
        ],
    }


def _share(row: Mapping[str, Any], name: str, missing: float) -> float:
    """A radius as a share of the row's norm; ``missing`` where there is no radius or no norm."""
    return missing if row[name] is None or not row["norm"] else float(row[name] / row["norm"])


def _median(values: Iterable[float]) -> float | None:
    middle = statistics.median(values)
    return middle if math.isfinite(middle) else None


def document_text(document: Mapping[str, Any]) -> str:
    """The file's text."""
    return json_text(document, indent=1) + "\n"


def read_document(path: Path) -> dict[str, Any]:
    """Read a result, whose digests must fit and whose protocol must be what it says.

    Raises:
        InputError: No such file, not a result, edited, or another protocol under a known name and version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON; leave it out of the folder, or restore it") from error
    if not isinstance(values, dict) or not {*MEASURED, "format", "results", "versions", "digest"} <= set(values):
        raise InputError(f"{path} is no result of attnrobust bench --protocol; leave it out of the folder")
    if values["format"] != FORMAT:
        raise InputError(
            f"{path} has format {values['format']}, this version reads {FORMAT}; use the one that wrote it"
        )
    _require_digests(path, values)
    known = PROTOCOLS.get(values["protocol"]["name"])
    if known is not None and known.version == values["protocol"]["version"] and known.as_dict() != values["protocol"]:
        raise InputError(f"{path} was not measured by protocol {known.name} {known.version}: its definition differs")
    return values


def _require_digests(path: Path, values: Mapping[str, Any]) -> None:
    try:
        fits = values["digest"] == digest_of({k: v for k, v in values.items() if k != "digest"})
        fits = fits and values["results"] == digest_of({name: values[name] for name in MEASURED})
    except ValueError:  # NaN, which this package never writes
        fits = False
    if not fits:
        raise InputError(f"{path} was edited or damaged: its digest does not fit its content; restore it")
