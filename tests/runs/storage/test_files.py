"""Result files: whole or not at all, and the same rows back."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnrobust.errors import InputError
from attnrobust.runs.rows import CertificateEntry, Row, row_from_dict
from attnrobust.runs.storage.atomic import require_writable, require_writable_file, write_atomically
from attnrobust.runs.storage.files import (
    JSON_NAME,
    PARQUET_NAME,
    PLOT_NAME,
    REPORT_NAME,
    json_text,
    report_digest,
    require_same_job,
    rows_digest,
    write_results,
)
from attnrobust.runs.storage.parquet import parquet_bytes, read_parquet

ENTRIES = {
    "a": CertificateEntry(0.05, "float64", 0.0, 0.01),
    "b": CertificateEntry(0.1, "probabilistic", 1e-9, 0.02),
}
FULL = Row(
    input_id="0001-ab", layer="encoder.layer.0", n=3, threat="frobenius", goal="displacement 10%", tolerance=0.5,
    certificate="b", certificate_kind="probabilistic", certified_radius=0.1, attack="token-moving", attack_radius=0.3,
    status="found", gap=3.0, seconds_certify=0.1, seconds_attack=0.2, seed=2**40,
    certificates=ENTRIES, skipped={"c": "needs a margin"},
    usage=1.0 + 1e-15, queries=100, problem="f" * 64, text="naïve café — 猫",
    tokens=("na", "##ïve", "猫"), token_moves=(0.1, 0.2, 1e-300),
)  # fmt: skip
EMPTY = Row("0002-cd", "encoder.layer.0", 7, "any-token", "margin mean", message="no radius")


def test_parquet_gives_the_same_rows_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes([FULL, EMPTY]))
    assert read_parquet(path) == [FULL, EMPTY]


def test_json_gives_the_same_rows_back() -> None:
    for row in (FULL, EMPTY):
        assert row_from_dict(json.loads(json_text(row.as_dict()))) == row


def test_no_rows_are_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes([]))
    assert read_parquet(path) == []


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(InputError, match="raduis"):
        row_from_dict(FULL.as_dict() | {"raduis": 1.0})


def test_infinity_never_reaches_json() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text(replace(FULL, gap=float("inf")).as_dict())


def test_results_are_three_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    written = write_results(out, [FULL, EMPTY], run={"model": "m", "seed": 3}, job="j", plot=b"png")
    assert (
        sorted(p.name for p in out.iterdir())
        == sorted(p.name for p in written)
        == sorted([PARQUET_NAME, JSON_NAME, PLOT_NAME])
    )
    document = json.loads((out / JSON_NAME).read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    assert document["run"] == {"model": "m", "seed": 3}
    assert "torch" in document["versions"]
    assert [row_from_dict(r) for r in document["rows"]] == [FULL, EMPTY]
    assert read_parquet(out / PARQUET_NAME) == [FULL, EMPTY]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_atomically(tmp_path, {"a": b"x"})
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk_leaves_the_old_files_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, [EMPTY], run={}, job="j")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second file of three: the first is already complete under its temporary name
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device; choose another --out"):
        write_results(tmp_path, [FULL], run={}, job="j", plot=b"png")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failing_plot_or_row_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path / "out", [replace(FULL, gap=float("nan"))], run={}, job="j")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_result_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    whole = parquet_bytes([FULL])
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*rows\.parquet"):
            read_parquet(path)
    with pytest.raises(InputError, match=r"absent\.parquet"):
        read_parquet(tmp_path / "absent.parquet")


def test_another_schema_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    monkeypatch.setattr("attnrobust.runs.storage.parquet.SCHEMA_VERSION", 99)
    path.write_bytes(parquet_bytes([FULL]))
    monkeypatch.undo()
    with pytest.raises(InputError, match="schema 99"):
        read_parquet(path)


def test_writable_directory_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is not a directory; choose another --out"):
            require_writable(path)


def test_no_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the superuser may write anywhere, the refusal of the system is put in its place."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("attnrobust.runs.storage.atomic.tempfile.TemporaryFile", refused)
    with pytest.raises(InputError, match="Permission denied; choose another --out") as caught:
        require_writable(tmp_path / "new")
    assert "\n" not in str(caught.value)


def test_a_directory_belongs_to_one_job(tmp_path: Path) -> None:
    require_same_job(tmp_path, "a")
    write_results(tmp_path, [FULL], run={}, job="a")
    require_same_job(tmp_path, "a")
    with pytest.raises(InputError, match="results of another job"):
        require_same_job(tmp_path, "b")
    for content in ("{", "[]", '{"rows": []}'):  # damaged, or older than the digest
        (tmp_path / JSON_NAME).write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="results of another job"):
            require_same_job(tmp_path, "a")


def test_only_a_report_of_other_rows_is_removed(tmp_path: Path) -> None:
    assert report_digest(tmp_path) is None
    page = '<meta name="attnrobust-rows" content="{}">'.format
    report = tmp_path / REPORT_NAME
    report.write_text(page(rows_digest([FULL])), encoding="utf-8")
    write_results(tmp_path, [replace(FULL, seconds_attack=9.0)], run={}, job="a")
    assert report.exists()
    write_results(tmp_path, [replace(FULL, attack_radius=0.4)], run={}, job="a")
    assert not report.exists()
    report.write_text("<html>from an older version</html>", encoding="utf-8")
    assert report_digest(tmp_path) == ""
    write_results(tmp_path, [FULL], run={}, job="a")
    assert not report.exists()


def test_json_escapes_what_no_encoding_holds() -> None:
    assert json_text({"path": "\udcff", "text": "é"}).isascii()
    assert json.loads(json_text(["\udcff"])) == ["\udcff"]
    assert json_text("é") == '"é"'
    assert json_text("é", ascii_only=True).isascii()


def test_a_target_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    require_writable_file(tmp_path / "new.csv", option="--csv")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="it is a directory; choose another --csv"):
        require_writable_file(tmp_path, option="--csv")
    with pytest.raises(InputError, match="make it or choose another --csv"):
        require_writable_file(tmp_path / "absent" / "new.csv", option="--csv")
