"""The directory of an experiment: finished parts, and a manifest that says what they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting
from attnrobust.runs.storage.atomic import require_writable, write_atomically
from attnrobust.runs.storage.files import MANIFEST, json_text

PARTS = "parts"
FORMAT = 1
"""Version of the directory's layout."""


def part_digest(experiment: Experiment, setting: Setting, part: Part) -> str:
    """SHA-256 of everything that the rows of a part depend on."""
    meaning = {
        "experiment": experiment.name,
        "version": experiment.version,
        "seed": setting.seed,
        "part": part.name,
        "config": dict(part.config),
    }
    return hashlib.sha256(f"{FORMAT};{json.dumps(meaning, sort_keys=True)}".encode()).hexdigest()


def job_digest(experiment: Experiment, setting: Setting, parts: Sequence[Part]) -> str:
    """SHA-256 over all parts: the digest of the configuration."""
    return hashlib.sha256(";".join(part_digest(experiment, setting, part) for part in parts).encode()).hexdigest()


class ExperimentStore:
    """Where rows of finished parts lie; each file is written whole or not at all.

    Args:
        directory: Made if it does not exist.
        job: Digest of the configuration.
        overwrite: Whether results of another configuration may be replaced.

    Raises:
        InputError: The directory cannot be written, or holds other results.
    """

    def __init__(self, directory: Path, job: str, *, overwrite: bool = False) -> None:
        require_writable(directory)
        there = _read(directory / MANIFEST)
        known = there is None or there.get("job") == job
        if not (known or overwrite):
            raise InputError(
                f"{directory} holds results of another job; choose another --out, or replace them by --overwrite"
            )
        self.directory = directory
        (directory / PARTS).mkdir(parents=True, exist_ok=True)

    def rows(self, part: Part, digest: str) -> tuple[list[Row], float] | None:
        """Rows and processor seconds of a finished part; None where it is still to compute."""
        found = _read(self.directory / PARTS / f"{part.name}.json")
        return None if found is None or found.get("digest") != digest else (found["rows"], float(found["seconds"]))

    def keep(self, part: Part, digest: str, rows: Sequence[Row], seconds: float) -> None:
        """Store the rows of a part."""
        text = json_text({"digest": digest, "seconds": round(seconds, 3), "rows": list(rows)}, indent=1)
        self._write(self.directory / PARTS, {f"{part.name}.json": text.encode()})

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write the files of the whole experiment, all or none."""
        self._write(self.directory, contents)

    def _write(self, directory: Path, contents: Mapping[str, bytes]) -> None:
        try:
            write_atomically(directory, contents)
        except OSError as error:
            raise InputError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from error


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, and an empty one where it is something else."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
