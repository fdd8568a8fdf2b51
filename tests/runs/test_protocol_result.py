"""The document of a protocol: its numbers by hand, its digests, and what is refused."""

import json
from pathlib import Path

import pytest

from attnrobust.errors import InputError
from attnrobust.runs.protocol import STANDARD
from attnrobust.runs.protocol_result import document_text, joined_rows, read_document, summary
from attnrobust.runs.rows import CertificateEntry, Row
from attnrobust.status import Status
from tests.protocol_cases import document


def row(number: int, *, certified: float, attack: float | None, status: Status = Status.FOUND) -> Row:
    entries = {"c": CertificateEntry(certified, "float64", 0.0, 1.0)}
    return Row(
        f"x{number}", "l", 3, "frobenius", "g", certificate="c", certified_radius=certified, attack_radius=attack,
        status=status, input_norm=10.0, row_id=str(number), certificates=entries,
    )  # fmt: skip


def test_rows_and_summary_by_hand() -> None:
    first = [row(1, certified=0.1, attack=0.4), row(2, certified=0.2, attack=None), row(3, certified=0.5, attack=0.8)]
    second = [row(1, certified=0.0, attack=0.2), row(2, certified=0.0, attack=None), row(3, certified=0.0, attack=0.9)]
    second[1] = row(2, certified=0.0, attack=None, status=Status.ERROR)
    rows = joined_rows(["a", "b"], [first, second])
    assert [r["attack_radius"] for r in rows] == [0.2, None, 0.8]
    assert [r["attack"] for r in rows] == ["b", None, "a"]
    assert rows[0]["gap"] == 2.0
    assert "seconds" not in json.dumps(rows)
    (entry,) = summary(rows, [0.01, 0.03])
    assert (entry["inputs"], entry["failed"], entry["unsound"]) == (3, 1, 0)
    assert (entry["median_certified"], entry["median_attack"], entry["median_gap"]) == (0.02, 0.08, 2.0)
    assert [at["certified"] for at in entry["at"]] == [1.0, 1 / 3]
    assert [at["broken"] for at in entry["at"]] == [0.0, 1 / 3]
    assert [at["undecided"] for at in entry["at"]] == [0.0, 1 / 3]


def test_any_attack_inside_a_certified_radius_is_unsound() -> None:
    rows = joined_rows(["a", "b"], [[row(1, certified=0.3, attack=0.4)], [row(1, certified=0.0, attack=0.2)]])
    assert rows[0]["unsound"]
    assert summary(rows, [])[0]["unsound"] == 1


def test_edited_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(document_text(document()), encoding="utf-8")
    assert read_document(path) == document()
    path.write_text(document_text(document()).replace("0.01", "0.09"), encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.json was edited"):
        read_document(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no result of"):
        read_document(path)
    other = STANDARD.as_dict() | {"seed": 7}
    path.write_text(document_text(document(protocol=other)), encoding="utf-8")
    with pytest.raises(InputError, match="its definition differs"):
        read_document(path)
