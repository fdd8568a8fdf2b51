"""Certificates in a report: each with its kind and reference, and why others have no radius."""

from dataclasses import replace

from attnrobust.reports.explained import explained, why_not
from attnrobust.runs.rows import CertificateEntry
from tests.runs.storage.test_files import FULL

ENTRY = CertificateEntry(0.1, "float64", 0.0, 0.5)
ROW = replace(FULL, certificates={"spread-lipschitz": ENTRY, "displacement": ENTRY}, certificate="displacement")


def test_each_says_what_it_is_the_winner_first() -> None:
    first, second = explained([ROW, ROW])
    assert (first.name, first.rows, first.best, second.best) == ("displacement", 2, 2, 0)
    assert first.about.startswith("Displacement of one attention layer")
    assert first.reference
    assert first.kind == "float64: proved for real numbers and computed in float64"


def test_one_that_is_not_known_is_still_listed() -> None:
    (one,) = explained([replace(FULL, certificates={"later": ENTRY})])
    assert (one.name, one.about) == ("later", "")


def test_reasons_are_counted_and_other_layers_are_no_news() -> None:
    foreign = {"kim2021-l2": "it speaks about L2Attention layers, not Attention"}
    rows = [replace(ROW, skipped=foreign | {"rigorous-local": "not run: dominated by displacement"})] * 3
    assert why_not(rows) == [("rigorous-local", "not run: dominated by displacement", 3)]
