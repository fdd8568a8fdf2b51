"""Data sets: every format gives the same texts, and what is wrong is told with its cure."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs import datasets
from attnrobust.runs.config import make_config
from attnrobust.runs.datasets import read_dataset
from attnrobust.runs.work import Workbench
from tests.assertions import refused
from tests.runs.test_config import BASE

TEXTS = ['A "quoted", text', "", "Größe\nin two lines", None]
LABELS = [0, 1, 2, 3]


def parquet(folder: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


def comma(folder: Path, separator: str = ",", suffix: str = "csv") -> Path:
    path = folder / f"x.{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([["label", "text"], *zip(LABELS, TEXTS, strict=True)])
    return path


def lines(folder: Path) -> Path:
    rows = [json.dumps({"label": label, "text": text}) for label, text in zip(LABELS, TEXTS, strict=True)]
    (folder / "x.jsonl").write_text("\n".join([rows[0], "", *rows[1:]]) + "\n", encoding="utf-8")
    return folder / "x.jsonl"


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    paths = [
        parquet(tmp_path, text=TEXTS, label=LABELS),
        comma(tmp_path),
        comma(tmp_path, "\t", "tsv"),
        lines(tmp_path),
    ]
    found = [read_dataset(path) for path in paths]
    assert [one.text for one in found[0]] == [TEXTS[0], TEXTS[2]]
    assert [one.id[:4] for one in found[0]] == ["0001", "0003"]
    assert all(one == found[0] for one in found)


def test_the_column_is_named_or_clear(tmp_path: Path) -> None:
    path = parquet(tmp_path, question=["a"], answer=["b"], number=[1])
    assert read_dataset(path, column="answer")[0].text == "b"
    with refused(InputError, r"name the column of the texts by --column \(question, answer\)"):
        read_dataset(path)
    with pytest.raises(UnknownNameError, match="answer"):
        read_dataset(path, column="anwser")
    with refused(InputError, "row 1 of column 'number' holds no text but int"):
        read_dataset(path, column="number")
    assert read_dataset(parquet(tmp_path, only=["a"], number=[1]))[0].text == "a"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for name, content, why in (
        ("a.txt", "x", "no data set that is read"), ("a.parquet", "x", "cannot read"),
        ("a.csv", "text\n", "holds no rows"), ("b.csv", "text\na,b\n", "more fields"),
        ("a.jsonl", "{", "line 1 is not JSON"), ("b.jsonl", "3", "no JSON object"),
        ("c.jsonl", '{"text": " "}', "holds no text in the column 'text'"), ("d.jsonl", '{"n": 1}', "none holds text"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with refused(InputError, why):
            read_dataset(tmp_path / name)
    with refused(InputError, "No such file"):
        read_dataset(tmp_path / "absent.csv")
    with refused(InputError, "state.json is missing"):
        read_dataset(tmp_path)


def test_a_directory_that_datasets_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not installed here: its part is played."""
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr(datasets, "find_spec", lambda _: None)
    with refused(InputError, "pip install datasets"):
        read_dataset(tmp_path)

    class Split:
        features: ClassVar = {"text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(dtype="int64")}

        def __getitem__(self, name: str) -> list[str]:
            return {"text": ["one", "two"]}[name]

    played: Any = ModuleType("datasets")
    played.load_from_disk = lambda _: Split()
    monkeypatch.setitem(sys.modules, "datasets", played)
    monkeypatch.setattr(datasets, "find_spec", lambda _: importlib.util.find_spec("json"))
    assert [line.text for line in read_dataset(tmp_path)] == ["one", "two"]
    played.load_from_disk = lambda _: {"train": Split(), "test": Split()}
    with refused(InputError, "splits train, test"):
        read_dataset(tmp_path)


def test_a_run_takes_one(tmp_path: Path) -> None:
    path = lines(tmp_path)
    config = make_config({**{k: v for k, v in BASE.items() if k not in ("texts", "tokens")}, "dataset": path})
    assert [source.text for source in Workbench(config).sources] == [TEXTS[0], TEXTS[2]]
    with refused(InputError, "give --dataset too"):
        make_config(BASE | {"column": "text"})
