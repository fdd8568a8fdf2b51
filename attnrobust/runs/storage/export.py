"""Rows of a run in formats that other programs read."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.rows import Row
from attnrobust.runs.storage.atomic import require_writable_file, write_text
from attnrobust.runs.storage.files import json_text
from attnrobust.runs.storage.store import RunStore
from attnrobust.runs.yardsticks import as_json


def export_rows(directory: Path, *, csv: Path | None = None, jsonl: Path | None = None) -> tuple[Path, ...]:
    """Write the finished rows of a run as CSV, JSON lines, or both.

    Args:
        directory: The run's output directory.
        csv: Target file; nested fields (certificates, skipped, tokens and the like) are JSON in their cells.
        jsonl: Target file; one object a line, fields as ``--json`` prints them.

    Returns:
        The files written.

    Raises:
        InputError: No target, no run, or a target that cannot be written.
    """
    targets = {path: render for path, render in ((csv, csv_text), (jsonl, jsonl_text)) if path is not None}
    if not targets:
        raise InputError("name a file by --csv FILE or --jsonl FILE, or a tracker by --log-to")
    for path, option in ((csv, "--csv"), (jsonl, "--jsonl")):
        if path is not None:
            require_writable_file(path, option=option)
    rows = RunStore.open(directory).rows()
    for path, render in targets.items():
        write_text(path, render(rows))
    return tuple(targets)


def jsonl_text(rows: Iterable[Row]) -> str:
    """One JSON object a line."""
    return "".join(json_text(as_json(row)) + "\n" for row in rows)


def csv_text(rows: Iterable[Row]) -> str:
    """A heading and one line a row; missing values are empty cells."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in rows:
        writer.writerow([_cell(value) for value in row.as_dict().values()])
    return out.getvalue()


def _cell(value: Any) -> Any:
    return json_text(value) if isinstance(value, dict | list) else value
