"""Texts of a data set: a column of Parquet, CSV, TSV or JSON lines, or of a directory that ``datasets`` saved."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError, UnknownNameError, first_line
from attnrobust.models.capture import TextLine, text_line
from attnrobust.runs.storage.parquet import parquet_column, parquet_columns

USUAL = ("text", "sentence", "content", "document")
"""Columns that are taken where none is named, in this order."""
FORMATS = ".parquet, .csv, .tsv, .jsonl or .ndjson"


@dataclass(frozen=True)
class Table:
    """The columns of a data set.

    Args:
        columns: Their names, and whether each holds text.
        column: Values of one of them, in order.
    """

    columns: Mapping[str, bool]
    column: Callable[[str], Iterable[object]]


def read_dataset(path: Path, *, column: str | None = None) -> tuple[TextLine, ...]:
    """Read the texts of a data set; rows without text are skipped, but counted in the numbers of the rows.

    Args:
        path: A file, or a directory that ``Dataset.save_to_disk`` wrote.
        column: The column; None takes one of ``USUAL``, or the only column of text.

    Raises:
        InputError: No such file, another format, damaged, no text in the column, or several columns to choose from.
        UnknownNameError: No such column.
    """
    if not path.exists():
        raise InputError(f"cannot read the dataset {path}: No such file or directory")
    table = _open(path)
    name = chosen(table.columns, column, path)
    texts = []
    for number, value in enumerate(table.column(name), start=1):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}: row {number} of column {name!r} holds no text but {type(value).__name__}")
        if value and value.strip():
            texts.append(text_line(number, value))
    if not texts:
        raise InputError(f"{path} holds no text in the column {name!r}")
    return tuple(texts)


def chosen(columns: Mapping[str, bool], asked: str | None, path: Path) -> str:
    """The column that is meant."""
    if asked is not None:
        if asked not in columns:
            raise UnknownNameError(f"column of {path}", asked, columns)
        return asked
    texts = [name for name, is_text in columns.items() if is_text]
    usual = [name for name in USUAL if name in texts]
    if not usual and len(texts) != 1:
        listed = ", ".join(texts) if texts else "none holds text"
        raise InputError(f"{path}: name the column of the texts by --column ({listed})")
    return usual[0] if usual else texts[0]


def _open(path: Path) -> Table:
    if path.is_dir():
        return _saved(path)
    if path.suffix == ".parquet":
        return Table(parquet_columns(path), lambda name: parquet_column(path, name))
    if path.suffix in (".csv", ".tsv"):
        return _of_records(_csv(path), path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _of_records(_json_lines(path), path)
    raise InputError(f"{path} is no data set that is read; give a file that ends in {FORMATS}, or --texts")


def _of_records(records: list[dict[str, Any]], path: Path) -> Table:
    """A table of records that may lack a key."""
    if not records:
        raise InputError(f"{path} holds no rows")
    names = dict.fromkeys(name for record in records for name in record)
    is_text = {
        name: any(isinstance(r.get(name), str) for r in records)
        and all(isinstance(r.get(name), str | None) for r in records)
        for name in names
    }
    return Table(is_text, lambda name: [record.get(name) for record in records])


def _csv(path: Path) -> list[dict[str, Any]]:
    """The rows below the line with the names of the columns."""
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=separator, restkey="", strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    if any("" in row for row in rows):
        raise InputError(f"{path} has a row with more fields than the first line names; quote texts with commas")
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON: {first_line(error)}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {number} is no JSON object with named values")
        records.append(record)
    return records


def _saved(path: Path) -> Table:
    """A directory that ``datasets`` saved."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise InputError(f"{path} is no directory that datasets saved (state.json is missing); give a file ({FORMATS})")
    if find_spec("datasets") is None:
        raise InputError(f"{path} needs the package datasets; pip install datasets, or save the texts as Parquet")
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    if isinstance(found, Mapping):
        raise InputError(
            f"{path} has the splits {', '.join(found)}; give the directory of one, as {path / next(iter(found))}"
        )
    is_text = {
        name: getattr(kind, "dtype", None) in ("string", "large_string") for name, kind in found.features.items()
    }
    return Table(is_text, lambda name: found[name])
