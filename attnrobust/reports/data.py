"""What a report and the gate judge: the rows of a run or of one command, and where they come from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnrobust.errors import InputError
from attnrobust.runs.rows import Row, row_from_dict
from attnrobust.runs.storage.files import JSON_NAME, MANIFEST, report_digest, rows_digest
from attnrobust.runs.storage.store import RunStore

MOST_DIGESTS = 100
"""Rows of one command whose digests are listed; results.json has the rest."""
MOST_PLACES = 3
"""Layers or depths in a title; more are counted."""


@dataclass(frozen=True)
class ReportData:
    """What a report is made of.

    Args:
        rows: The rows.
        title: Above everything.
        subtitle: When and of what.
        steps: How to reproduce: sentence and code.
        planned: Number of rows of the complete run.
    """

    rows: Sequence[Row]
    title: str
    subtitle: str
    steps: Sequence[tuple[str, str]]
    planned: int


def read_report_data(directory: Path) -> ReportData:
    """The rows and the description of a run, or of one command's ``--out`` directory.

    Raises:
        InputError: Neither is there, or the files are damaged.
    """
    if (directory / MANIFEST).exists() or not (directory / JSON_NAME).exists():
        return _from_run(directory)
    return _from_command(directory / JSON_NAME)


def _from_run(directory: Path) -> ReportData:
    store = RunStore.open(directory)
    manifest = store.manifest
    config = dict(manifest.config)
    text = yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False, allow_unicode=True)
    steps = [
        ("Configuration; save it as run.yaml:", text.rstrip()),
        ("Run it:", "attnrobust run run.yaml"),
        ("What it ran on:", _listing(manifest.versions)),
        ("Content digests (a run with the same ones has the same rows):", _listing(manifest.meaning)),
    ]
    places = _count(len(manifest.layers), "layer" if config.get("at") is None else "depth")
    subtitle = f"begun {manifest.created}; {places}; run {manifest.digest[:12]}"
    rows = store.rows()
    return ReportData(rows, _title(str(config["model"]), rows), subtitle, steps, manifest.rows)


def _from_command(path: Path) -> ReportData:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [row_from_dict(values) for values in document["rows"]]
        options = {k: v for k, v in document["run"].items() if v is not None and v is not False}
        versions, written = document["versions"], document["written"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}); run the command again") from error
    steps = [("Options:", _listing(options)), ("What it ran on:", _listing(versions))]
    if command := document.get("command"):
        steps.insert(0, ("The command:", str(command)))
    if digests := {row.input_id: row.problem for row in rows[:MOST_DIGESTS] if row.problem}:
        steps.append(("Digests of the problems (weights, tokens, threat and goal), input by input:", _listing(digests)))
    return ReportData(rows, _title(str(options["model"]), rows), f"written {written}", steps, len(rows))


def _title(model: str, rows: Sequence[Row]) -> str:
    """What the page is about, and no more: layers of a model, or the model from depths on with its goals."""
    places = list(dict.fromkeys(row.layer for row in rows))
    goals = dict.fromkeys(row.goal for row in rows if row.depth is not None)
    told = ", ".join(places) if len(places) <= MOST_PLACES else f"{len(places)} of them"
    if goals:
        return f"Robustness of {model}: {', '.join(goals)}; tokens moved at {told}"
    what = f"attention layer {told}" if len(places) == 1 else f"attention layers ({told})"
    return f"Robustness of {what if places else 'attention layers'} of {model}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listing(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def is_stale(directory: Path, rows: Sequence[Row]) -> bool:
    """Whether the report in a directory was made from other rows than these; False where there is no report."""
    return report_digest(directory) not in (None, rows_digest(rows))
