"""Results on disk: rows as Parquet and JSON, every file written whole or not at all."""

import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.rows import SCHEMA_VERSION, CertificateEntry, Row

PARQUET_NAME, JSON_NAME, PLOT_NAME = "results.parquet", "results.json", "gap.png"

_TEXT: tuple[str, ...] = (
    "input_id",
    "layer",
    "threat",
    "goal",
    "certificate",
    "certificate_kind",
    "attack",
    "status",
    "message",
)
_TEXT += ("problem", "text", "row_id")
_FLOAT: tuple[str, ...] = (
    "tolerance",
    "margin",
    "certified_radius",
    "attack_radius",
    "gap",
    "seconds_certify",
    "seconds_attack",
)
_FLOAT += ("epsilon", "usage", "input_norm")
_INTEGER = ("n", "seed", "queries")


# ---- atomic files ----------------------------------------------------------------------------------------------------


def write_atomically(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files so that a reader sees the old content or the new, never a part, also after a power cut.

    All contents reach the disk under temporary names before the first file is replaced; so a full disk changes nothing.

    Args:
        directory: It must exist.
        contents: File name to content.

    Raises:
        OSError: The disk is full or not writable; the old files are untouched.
    """
    temporary: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            handle, made = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
            temporary[name] = Path(made)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary[name].chmod(0o666 & ~_umask())  # mkstemp makes it private
        for name, path in temporary.items():
            path.replace(directory / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    _sync_directory(directory)


def write_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all.

    Raises:
        InputError: Its directory does not exist or cannot be written.
    """
    try:
        write_atomically(path.absolute().parent, {path.name: text.encode()})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; not every file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def require_writable(directory: Path) -> None:
    """Refuse an output directory that cannot be written, before any work is done; nothing is created.

    Args:
        directory: It may not exist yet; then its nearest existing parent must allow making it.

    Raises:
        InputError: It is a file, or there is no permission.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write to {directory}: {existing} is not a directory; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from error


# ---- results ---------------------------------------------------------------------------------------------------------


def write_results(
    directory: Path, rows: Sequence[Row], *, run: Mapping[str, Any], plot: bytes | None = None
) -> tuple[Path, ...]:
    """Write rows as Parquet and JSON, and a plot, into a directory; all contents are made before the first file is.

    Args:
        directory: Made if it does not exist.
        rows: The rows.
        run: What the run was (model, options, seed); goes into the JSON file with the versions.
        plot: A PNG, or None.

    Returns:
        The files written.

    Raises:
        InputError: The directory cannot be written.
    """
    document = {"schema_version": SCHEMA_VERSION, "run": dict(run), "versions": versions(), "written": _now()}
    contents = {
        PARQUET_NAME: parquet_bytes(rows),
        JSON_NAME: (json_text(document | {"rows": [row.as_dict() for row in rows]}, indent=1) + "\n").encode(),
    }
    if plot is not None:
        contents[PLOT_NAME] = plot
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory, contents)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from error
    return tuple(directory / name for name in contents)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity are refused (rows hold None instead)."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


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


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_bytes(rows: Iterable[Row], *, run: str | None = None) -> bytes:
    """Rows as one Parquet file; ``certificates`` and ``skipped`` are lists of records sorted as the row has them.

    Args:
        rows: The rows.
        run: Digest of the run that they belong to, kept in the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(run)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in rows:
        values = row.as_dict()
        values["certificates"] = [{"method": m} | entry for m, entry in values["certificates"].items()]
        values["skipped"] = [{"method": m, "reason": r} for m, r in values["skipped"].items()]
        for name, column in columns.items():
            column.append(values[name])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_parquet(path: Path, *, run: str | None = None) -> list[Row]:
    """Rows of a Parquet file.

    Args:
        path: A file that ``parquet_bytes`` made.
        run: Digest of the run that it must belong to; None takes any.

    Raises:
        InputError: Missing, damaged, of another schema version, or of another run.
    """
    return [row_from_dict(_unlisted(values)) for values in _read_table(path, run).to_pylist()]


def read_row_ids(path: Path, *, run: str | None = None) -> list[str]:
    """Only the row ids of a Parquet file; otherwise as ``read_parquet``."""
    ids: list[str] = _read_table(path, run, columns=["row_id"]).column("row_id").to_pylist()
    return ids


def _read_table(path: Path, run: str | None, *, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    metadata = table.schema.metadata or {}
    written = int(metadata.get(b"attnrobust_schema", b"0"))
    if written != SCHEMA_VERSION:
        raise InputError(f"{path} has row schema {written}, this version reads {SCHEMA_VERSION}; make it again")
    if run is not None and metadata.get(b"attnrobust_run") != run.encode():
        raise InputError(f"{path} belongs to another run; move it away")
    return table


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """The row that ``Row.as_dict`` (or one line of ``--json``) describes; unknown fields are an error."""
    known = set(Row.__dataclass_fields__)
    if foreign := sorted(set(values) - known):
        raise InputError(f"unknown row fields: {', '.join(foreign)}")
    entries = {name: CertificateEntry(**entry) for name, entry in dict(values.get("certificates") or {}).items()}
    lists = {name: tuple(values.get(name) or ()) for name in ("tokens", "token_moves")}
    return Row(**(dict(values) | lists | {"certificates": entries, "skipped": dict(values.get("skipped") or {})}))


def _unlisted(values: dict[str, Any]) -> dict[str, Any]:
    certificates = {c["method"]: {k: v for k, v in c.items() if k != "method"} for c in values["certificates"]}
    return values | {"certificates": certificates, "skipped": {s["method"]: s["reason"] for s in values["skipped"]}}


def _schema(run: str | None) -> Any:
    import pyarrow as pa

    certificate = [("method", pa.string()), ("radius", pa.float64()), ("kind", pa.string())]
    certificate += [("failure_probability", pa.float64()), ("seconds", pa.float64())]
    types: dict[str, Any] = dict.fromkeys(_TEXT, pa.string())
    types |= dict.fromkeys(_FLOAT, pa.float64()) | dict.fromkeys(_INTEGER, pa.int64())
    types |= {
        "certificates": pa.list_(pa.struct(certificate)),
        "skipped": pa.list_(pa.struct([("method", pa.string()), ("reason", pa.string())])),
        "tokens": pa.list_(pa.string()),
        "token_moves": pa.list_(pa.float64()),
    }
    fields = [pa.field(name, types[name]) for name in Row.__dataclass_fields__]
    metadata = {"attnrobust_schema": str(SCHEMA_VERSION)} | ({} if run is None else {"attnrobust_run": run})
    return pa.schema(fields, metadata=metadata)
