"""Results in a notebook: one line, plain values, a table in which nothing is taken for markup."""

import json
import math
import sys

import pytest
import torch

from attnrobust.errors import InputError
from attnrobust.notebook import Shown, number
from attnrobust.results import AttackResult, Certificate, CertificationReport, Comparison, Kind, NotApplicable, Status

CERTIFICATE = Certificate("p" * 64, "displacement", Kind.FLOAT64, 0.0, 0.1, "here", "<b>Paper</b> & more", 0.2, 5)
REPORT = CertificationReport("p" * 64, (CERTIFICATE,), (NotApplicable("conic", "needs a margin"),), 0.3)
FOUND = AttackResult("p" * 64, "token-moving", Status.FOUND, 0.12345678, 1.0, torch.zeros(99, 99), 10, 1.5, 0)
NOTHING = AttackResult("p" * 64, "token-moving", Status.NOT_FOUND, math.inf, 0.5, None, 10, 1.5, 0)


@pytest.mark.parametrize("result", [REPORT, FOUND, NOTHING, Comparison("p", FOUND, REPORT, Status.FOUND, 1.2345)])
def test_every_result_is_one_line_and_plain_values(result: Shown) -> None:
    assert "\n" not in repr(result)
    assert len(repr(result)) < 300
    assert "tensor" not in repr(result)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert result.summary() in repr(result)


def test_a_comparison_says_both_sides() -> None:
    summary = Comparison("p", FOUND, REPORT, Status.FOUND, 1.2345).summary()
    for part in ("certified_radius 0.1", "displacement", "attack_radius 0.1235", "gap 1.23"):
        assert part in summary
    missing = Comparison("p", NOTHING, REPORT, Status.NOT_FOUND, math.inf).to_dict()
    assert missing["gap"] is missing["attack_radius"] is None


def test_a_notebook_shows_tables_and_no_foreign_markup() -> None:
    html = REPORT._repr_html_()
    assert html.count("<table>") == 3
    assert "&lt;b&gt;Paper&lt;/b&gt; &amp; more" in html
    assert "<b>" not in html


def test_numbers_that_are_not_finite_are_none() -> None:
    assert [number(value) for value in (1.0, None, math.inf, math.nan)] == [1.0, None, None, None]


def test_data_frames_have_one_line_a_certificate_or_a_result() -> None:
    pytest.importorskip("pandas")
    assert list(REPORT.to_pandas()["radius"]) == [CERTIFICATE.radius]
    assert NOTHING.to_pandas()["radius"].isna().all()
    assert Comparison("p", FOUND, REPORT, Status.FOUND, 1.2345).to_pandas()["gap"][0] == 1.2345


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        REPORT.to_pandas()
