"""A small protocol under the standard's name, and a document by hand."""

from dataclasses import replace
from typing import Any

from attnrobust.runs.protocol import STANDARD, ProtocolAttack
from attnrobust.runs.protocol_result import FORMAT, MEASURED, digest_of

SMALL = replace(
    STANDARD,
    version=9,
    threats=("frobenius",),
    certificates=("castin2024-derived", "kim2021-l2"),
    attacks=(ProtocolAttack(name="token-moving", restarts=1, steps=3),),
)


def document(model: str = "a", **changes: Any) -> dict[str, Any]:
    """A result without rows: one layer with a median certified share of 1 %, unless ``changes`` say otherwise."""
    entry = {"layer": "l", "threat": "frobenius", "goal": "displacement 10%", "inputs": 3, "failed": 0, "unsound": 0}
    entry |= {"median_certified": 0.01, "median_attack": 0.02, "median_gap": 2.0} | changes.pop("entry", {})
    values = {"format": FORMAT, "protocol": SMALL.as_dict(), "model": {"name": model, "digest": "m"}, "layers": ["l"]}
    values |= {"inputs": {"digest": "i", "each": []}, "configuration": "c", "rows": [], "summary": [entry]} | changes
    values |= {"results": digest_of({name: values[name] for name in MEASURED}), "versions": {}}
    return values | {"digest": digest_of(values)}
