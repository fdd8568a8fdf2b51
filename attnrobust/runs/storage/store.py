"""The store of a run: a manifest and Parquet parts; what is on disk is whole, and says which run it belongs to."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.rows import SCHEMA_VERSION, Row, layer_order
from attnrobust.runs.storage.atomic import require_writable, write_atomically
from attnrobust.runs.storage.files import JSON_NAME, MANIFEST, job_digest, json_text
from attnrobust.runs.storage.parquet import parquet_bytes, read_parquet, read_row_ids
from attnrobust.text import natural_order

PARTS = "parts"
FORMAT = 1
"""Version of the manifest and of the directory's layout."""

SHOWN_DIFFERENCES = 6


@dataclass(frozen=True)
class Manifest:
    """What a run is.

    Args:
        meaning: Everything that may change a number, by content: digests of model, inputs and goals, names, seed.
        config: The whole effective configuration.
        rows: Number of rows of the complete run.
        layers: Names of the layers.
        versions: Versions of what computes.
        created: When the run began.
    """

    meaning: Mapping[str, Any]
    config: Mapping[str, Any]
    rows: int
    layers: Sequence[str]
    versions: Mapping[str, str]
    created: str

    @property
    def digest(self) -> str:
        """SHA-256 of the meaning and the row schema; parts carry it."""
        return job_digest(self.meaning)

    def as_json(self) -> str:
        """The file's text."""
        return json_text(vars(self) | {"format": FORMAT, "row_schema": SCHEMA_VERSION, "run": self.digest}, indent=1)


class RunStore:
    """The rows of one run in a directory.

    Use ``create`` or ``open``.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def create(cls, directory: Path, manifest: Manifest) -> "RunStore":
        """Begin a run in a directory, or go on with the same run that is there.

        Raises:
            InputError: The directory cannot be written, or holds another run (the difference is named).
        """
        if (directory / MANIFEST).exists():
            store = cls.open(directory)
            if differences := _differences(store.manifest.meaning, manifest.meaning):
                raise InputError(
                    f"{directory} holds another run: {'; '.join(differences)}; choose another --out, "
                    "or give back what it was made with"
                )
            return store
        require_writable(directory)
        if (directory / JSON_NAME).exists():
            raise InputError(f"{directory} holds results of one command ({JSON_NAME}); choose another --out")
        if (directory / PARTS).exists() and any((directory / PARTS).glob("*.parquet")):
            raise InputError(f"{directory} has parts of a run but no {MANIFEST}; restore it or choose another --out")
        _guarded_write(directory, {MANIFEST: (manifest.as_json() + "\n").encode()})
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: Path) -> "RunStore":
        """Open the run in a directory.

        Raises:
            InputError: No run there, a damaged manifest, or one of another format.
        """
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            form, schema, digest = (values.pop(key) for key in ("format", "row_schema", "run"))
            manifest = Manifest(**values)
        except FileNotFoundError as error:
            raise InputError(f"{directory} holds no run ({MANIFEST} is missing)") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}); run the same configuration into a new directory and copy "
                f"{PARTS}/ there before you resume it: parts of the same run are taken over"
            ) from error
        if (form, schema) != (FORMAT, SCHEMA_VERSION):
            raise InputError(
                f"{path} has format {form} and row schema {schema}, this version reads {FORMAT} and {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )
        if digest != manifest.digest:
            raise InputError(f"{path} was edited: its digest does not fit its content; restore it")
        return cls(directory, manifest)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def parts(self) -> list[Path]:
        """Files of finished rows."""
        return sorted((self.directory / PARTS).glob("*.parquet"))

    def done(self) -> set[str]:
        """Row ids that are on disk."""
        return {row_id for path in self.parts() for row_id in read_row_ids(path, run=self.manifest.digest)}

    def rows(self) -> list[Row]:
        """Every finished row once, by input, layer, threat and goal, whatever order they were computed in."""
        rows = (row for path in self.parts() for row in read_parquet(path, run=self.manifest.digest))
        found = {row.row_id: row for row in rows}
        return sorted(found.values(), key=lambda r: (natural_order(r.input_id), layer_order(r), r.threat, r.goal))

    def append(self, rows: Sequence[Row]) -> Path:
        """Write finished rows as one part, whole or not at all.

        Raises:
            InputError: The disk is full or not writable; earlier parts are untouched.
        """
        ids = ";".join(sorted(str(row.row_id) for row in rows))
        name = f"{hashlib.sha256(ids.encode()).hexdigest()[:20]}.parquet"
        _guarded_write(self.directory / PARTS, {name: parquet_bytes(rows, run=self.manifest.digest)})
        return self.directory / PARTS / name

    # ---- one writer --------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, shard: str = "all") -> Iterator[None]:
        """Hold the right to compute a shard; the system takes it back when the process ends, however it ends.

        Args:
            shard: Name of the shard; several shards of one run may be computed at the same time.

        Raises:
            InputError: Another process computes this shard.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.directory / f".lock-{shard}", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(f"another process is at work on {self.directory}; wait for it or end it") from error
        except OSError as error:
            raise InputError(f"cannot write to {self.directory}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()


def _guarded_write(directory: Path, contents: Mapping[str, bytes]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory, contents)
    except OSError as error:
        raise InputError(
            f"cannot write to {directory}: {error.strerror or error}; what was written before is intact, "
            "make room or permission and resume"
        ) from error


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, key by key, a few of them in words."""
    old, new = dict(_flat(stored)), dict(_flat(wanted))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    told = [f"{key} was {_brief(old.get(key))}, is {_brief(new.get(key))}" for key in keys[:SHOWN_DIFFERENCES]]
    return told + ([f"and {len(keys) - SHOWN_DIFFERENCES} more"] if len(keys) > SHOWN_DIFFERENCES else [])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value))


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:24] + "..." + text[-8:]
