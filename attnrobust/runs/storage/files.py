"""The results of one command on disk: rows as Parquet and JSON, a plot, and which job they belong to."""

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.rows import SCHEMA_VERSION, Row, without_times
from attnrobust.runs.storage.atomic import require_writable, require_writable_file, write_atomically
from attnrobust.runs.storage.parquet import parquet_bytes
from attnrobust.runs.yardsticks import as_json

PARQUET_NAME, JSON_NAME, PLOT_NAME, REPORT_NAME = "results.parquet", "results.json", "gap.png", "report.html"
YOUNGER = ("label", "attack_label", "token_radii", "token_norm", "word_distance")
"""Fields of rows that came later."""
MANIFEST = "manifest.json"
"""A directory that has it holds a run of many rows."""


def job_digest(meaning: Mapping[str, Any]) -> str:
    """SHA-256 of what a job means: two jobs with the same digest compute the same rows."""
    return hashlib.sha256(f"{SCHEMA_VERSION};{json.dumps(meaning, sort_keys=True)}".encode()).hexdigest()


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 of rows without their seconds; a report carries the digest of the rows that it shows."""
    text = "\n".join(json_text(_digested(row)) for row in without_times(rows))
    return hashlib.sha256(text.encode()).hexdigest()


def _digested(row: Row) -> dict[str, Any]:
    """What the digest is about; fields that are younger than reports on disk count where they say something."""
    return {name: value for name, value in row.as_dict().items() if name not in YOUNGER or value not in (None, [])}


def require_results_place(directory: Path) -> None:
    """Refuse a directory that results cannot be written to, or that holds a run of many rows.

    Raises:
        InputError: With the cure.
    """
    require_writable(directory)
    if (directory / MANIFEST).exists():
        raise InputError(f"{directory} holds a run of many rows (attnrobust resume); choose another --out")
    if directory.exists():
        for name in (PARQUET_NAME, JSON_NAME, PLOT_NAME):
            require_writable_file(directory / name, option="--out")


def require_same_job(directory: Path, job: str) -> None:
    """Refuse to replace the results of another job.

    Args:
        directory: Where results will be written.
        job: Digest of the job, from ``job_digest``.

    Raises:
        InputError: The directory holds results of another job, or such that do not say of which.
    """
    path = directory / JSON_NAME
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):
        there = None
    if there != job:
        raise InputError(
            f"{directory} holds results of another job; choose another --out, or replace them by --overwrite"
        )


def write_results(
    directory: Path,
    rows: Sequence[Row],
    *,
    run: Mapping[str, Any],
    job: str,
    plot: bytes | None = None,
    command: str | None = None,
) -> tuple[Path, ...]:
    """Write rows as Parquet and JSON, and a plot, into a directory; all contents are made before the first file is.

    A report that was made there from other rows is removed, because beside the new ones it would mislead.

    Args:
        directory: Made if it does not exist.
        rows: The rows.
        run: What the run was (model, options, seed); goes into the JSON file with the versions.
        job: Digest of the job, see ``require_same_job``.
        plot: A PNG, or None.
        command: What was typed, for the report; None leaves it out.

    Returns:
        The files written.

    Raises:
        InputError: The directory cannot be written.
    """
    document = {"schema_version": SCHEMA_VERSION, "run": dict(run), "job": job, "versions": versions()}
    document |= {} if command is None else {"command": command}
    document |= {"written": _now(), "rows": [as_json(row) for row in rows]}
    contents = {PARQUET_NAME: parquet_bytes(rows), JSON_NAME: (json_text(document, indent=1) + "\n").encode()}
    if plot is not None:
        contents[PLOT_NAME] = plot
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory, contents)
        if report_digest(directory) not in (None, rows_digest(rows)):
            (directory / REPORT_NAME).unlink()
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from error
    return tuple(directory / name for name in contents)


def report_digest(directory: Path) -> str | None:
    """Digest of the rows that the report in a directory was made from; empty if it does not say, None without one."""
    try:
        head = (directory / REPORT_NAME).read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return None
    found = re.search(r'<meta name="attnrobust-rows" content="([0-9a-f]{64})">', head)
    return found[1] if found else ""


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON: NaN and infinity are refused (rows hold None instead).

    Args:
        value: What it says.
        indent: Spaces of a level; None puts everything on one line.
        ascii_only: Escape every other character. What UTF-8 cannot hold is escaped always.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as in a path that is not UTF-8
        return json_text(value, indent=indent, ascii_only=True)
    return text


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from attnrobust import __version__

    found = {"attnrobust": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
