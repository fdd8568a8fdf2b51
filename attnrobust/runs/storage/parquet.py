"""Rows as Parquet and back; the only file that imports pyarrow."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
from attnrobust.runs.rows import SCHEMA_VERSION, Row, row_from_dict

_TEXT = (
    *("input_id", "layer", "threat", "goal", "certificate", "certificate_kind", "attack", "status", "message"),
    *("problem", "text", "row_id", "goal_scope", "label", "attack_label"),
)
_FLOAT = (
    *("tolerance", "margin", "certified_radius", "attack_radius", "gap", "seconds_certify", "seconds_attack"),
    *("epsilon", "usage", "input_norm", "token_norm", "word_distance"),
)
_INTEGER = ("n", "seed", "queries")


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


def parquet_columns(path: Path) -> dict[str, bool]:
    """The columns of any Parquet file, and whether each holds text.

    Raises:
        InputError: Missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(path):
        schema = pq.read_schema(path)
    return {field.name: pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in schema}


def parquet_column(path: Path, name: str) -> list[Any]:
    """The values of one column of any Parquet file."""
    import pyarrow.parquet as pq

    with _readable(path):
        values: list[Any] = pq.read_table(path, columns=[name]).column(name).to_pylist()
    return values


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _read_table(path: Path, run: str | None, *, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    with _readable(path):
        table = pq.read_table(path, columns=columns)
    metadata = table.schema.metadata or {}
    written = int(metadata.get(b"attnrobust_schema", b"0"))
    if written != SCHEMA_VERSION:
        raise InputError(f"{path} has row schema {written}, this version reads {SCHEMA_VERSION}; make it again")
    if run is not None and metadata.get(b"attnrobust_run") != run.encode():
        raise InputError(f"{path} belongs to another run; move it away")
    return table


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
        "token_radii": pa.list_(pa.float64()),
    }
    fields = [pa.field(name, types[name]) for name in Row.__dataclass_fields__]
    metadata = {"attnrobust_schema": str(SCHEMA_VERSION)} | ({} if run is None else {"attnrobust_run": run})
    return pa.schema(fields, metadata=metadata)
