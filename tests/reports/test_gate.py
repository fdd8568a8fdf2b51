"""The gate: what falls short is counted, and an unsound row passes no threshold."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.reports.gate import Thresholds, judge, junit_xml, of_kinds, summary, worst
from attnrobust.runs.plan import Shard
from attnrobust.runs.rows import CertificateEntry, Row
from attnrobust.runs.run import run as run_all
from attnrobust.runs.storage.files import write_results
from tests.runs.storage.test_files import EMPTY, FULL
from tests.runs.test_run import NO_SHARD, configured, write_files


def rows(*radii: float) -> list[Row]:
    return [replace(FULL, input_id=f"x{i}", certified_radius=r, gap=0.3 / r) for i, r in enumerate(radii)]


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text.encode())  # noqa: S314 - made here


@pytest.mark.parametrize(
    ("radii", "quantile", "passes"),
    [
        ((0.1, 0.2, 0.3), 0.0, True),
        ((0.1, 0.2, 0.05), 0.0, False),
        ((0.1, 0.2, 0.05), 0.34, True),
        ((0.1, 0.05, 0.05), 0.34, False),
        ((0.05,) * 3 + (0.1,) * 27, 0.1, True),
        ((0.05,) * 4 + (0.1,) * 26, 0.1, False),
        ((), 0.0, False),
    ],
)
def test_a_share_may_fall_short(radii: tuple[float, ...], quantile: float, passes: bool) -> None:
    verdict = judge(rows(*radii), Thresholds(min_certified=0.1, quantile=quantile))
    assert verdict.passed is passes
    assert summary(verdict).startswith("passed" if passes else "failed")


def test_gaps() -> None:
    made = rows(0.1, 0.05)
    assert judge(made, Thresholds(max_gap=6.001)).shortfalls == ["", ""]
    assert judge(made, Thresholds(max_gap=3.001)).shortfalls == ["", "gap 6 is above 3.001"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (EMPTY, "error: no radius"),
        (replace(FULL, status="timeout", message=None), "timeout: no result"),
        (replace(FULL, status="unsound", message="inside"), "unsound: inside"),
        (replace(FULL, status="not_found", gap=None), "the gap is unknown (not found)"),
        (replace(FULL, certified_radius=0.0, gap=None), "certified radius 0 is below 0.01; the gap is unknown (found)"),
        (
            replace(FULL, certified_radius=None, gap=None),
            "certified radius - is below 0.01; the gap is unknown (found)",
        ),
    ],
)
def test_what_is_not_known_falls_short(row: Row, says: str) -> None:
    (shortfall,) = judge([row], Thresholds(min_certified=0.01, max_gap=100.0)).shortfalls
    assert shortfall == says


def test_unsound_rows_pass_no_quantile() -> None:
    verdict = judge([*rows(*[0.1] * 99), replace(FULL, status="unsound")], Thresholds(min_certified=0.0, quantile=0.9))
    assert not verdict.passed
    assert verdict.unsound == 1


def test_an_unfinished_run_does_not_pass() -> None:
    verdict = judge(rows(0.1), Thresholds(min_certified=0.0), planned=3)
    assert not verdict.passed
    assert "2 are not computed yet" in summary(verdict)


@pytest.mark.parametrize(
    "values",
    [{}, {"min_certified": -1.0}, {"max_gap": 0.5}, {"max_gap": 2.0, "quantile": 1.0}, {"min_certified": float("nan")}],
)
def test_thresholds_that_mean_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Thresholds(**values)


def test_junit() -> None:
    made = [*rows(0.1, 0.05), replace(FULL, input_id="bad\x00\x1b<", status="unsound", message="in\x07side")]
    suite = parsed(junit_xml(judge(made, Thresholds(min_certified=0.1)), name="s"))
    assert suite.attrib == {"name": "s", "tests": "4", "errors": "1", "failures": "2", "skipped": "0"}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases[:3]] == ["x0", "x1", "bad??<"]
    assert [child.tag for case in cases for child in case] == ["failure", "error", "failure"]


def test_junit_shows_what_the_quantile_excuses() -> None:
    suite = parsed(junit_xml(judge(rows(0.1, 0.05), Thresholds(min_certified=0.1, quantile=0.5)), name="s"))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_files(tmp_path)
    run_all(configured(files), shard=Shard(0, 2))
    check = ["check", str(files / "out"), "--junit", str(tmp_path / "j.xml"), "--min-certified"]
    assert run([*check, "0"]) == ExitCode.BELOW
    assert "6 are not computed yet" in capsys.readouterr().err
    run_all(configured(files), shard=NO_SHARD)
    assert run([*check, "0"]) == ExitCode.OK
    assert run([*check, "1e6"]) == ExitCode.BELOW
    assert parsed((tmp_path / "j.xml").read_text(encoding="utf-8")).get("tests") == "13"
    assert run(["check", str(files / "out")]) == ExitCode.USAGE
    assert "nothing to check" in capsys.readouterr().err
    assert run([*check[:2], "--max-gap", "2", "--junit", str(tmp_path / "no" / "j.xml")]) == ExitCode.USAGE


def test_the_command_on_unsound_rows(tmp_path: Path) -> None:
    write_results(tmp_path, [replace(FULL, status="unsound", message="inside")], run={"model": "m"}, job="j")
    assert run(["check", str(tmp_path), "--min-certified", "0"]) == ExitCode.UNSOUND


def test_the_verdict_on_a_readout_says_what_it_is_about() -> None:
    verdict = judge([replace(FULL, goal_scope="not the model")] * 2, Thresholds(min_certified=0.0))
    assert summary(verdict) == "passed: 0 of 2 rows fall short, 0 may; not the model"
    (note,) = parsed(junit_xml(verdict, name="x")).findall("properties/property")
    assert note.attrib == {"name": "goal scope", "value": "not the model"}
    assert parsed(junit_xml(judge([FULL], Thresholds(min_certified=0.0)), name="x")).find("properties") is None


def test_a_share_is_of_what_the_threat_moves() -> None:
    row = replace(FULL, input_norm=30.0, token_norm=10.0)
    thresholds = Thresholds(min_share=0.005)
    assert list(judge([row], thresholds).shortfalls) == ["certified radius 0.333% of the input's norm is below 0.5%"]
    assert judge([replace(row, threat="any-token")], thresholds).passed
    (reason,) = judge([replace(row, threat="per-token-linf")], thresholds).shortfalls
    assert "give --min-certified a number" in reason


def test_a_share_of_a_token_and_of_the_way_to_the_next_word() -> None:
    row = replace(FULL, input_norm=30.0, token_norm=10.0, word_distance=0.4)
    (told,) = judge([row], Thresholds(min_share=0.02, share_of="token")).shortfalls
    assert told == "certified radius 1% of the median token norm is below 2%"
    assert judge([row], Thresholds(min_share=0.0249, share_of="word")).passed
    (told,) = judge([row], Thresholds(min_share=0.03, share_of="word")).shortfalls
    assert told.endswith("% of the way to the nearest other word is below 3%")
    (told,) = judge([replace(row, word_distance=None)], Thresholds(min_share=0.0, share_of="word")).shortfalls
    assert told.startswith("the row knows no way to the nearest other word")
    with pytest.raises(UnknownNameError, match="token"):
        Thresholds(min_share=0.1, share_of="tokn")


def test_only_certificates_of_a_kind_count() -> None:
    entries = {"a": CertificateEntry(0.1, "float64", 0.0, 0.0), "b": CertificateEntry(0.06, "rigorous", 0.0, 0.0)}
    row = replace(FULL, certificates=entries, certificate="a", certified_radius=0.1, attack_radius=0.3, gap=3.0)
    (rigorous,) = of_kinds([row], ["rigorous"])
    assert (rigorous.certificate, rigorous.certified_radius, rigorous.certificate_kind) == ("b", 0.06, "rigorous")
    assert rigorous.gap == pytest.approx(5.0)
    assert of_kinds([row], ["rigorous", "float64"]) == [row]
    (none,) = of_kinds([row], ["probabilistic"])
    assert (none.certified_radius, none.gap, none.certificate) == (0.0, None, None)
    misclassified = replace(row, status="misclassified", certified_radius=0.0, certificates={})
    assert of_kinds([misclassified], ["rigorous"]) == [misclassified]
    with pytest.raises(UnknownNameError, match="rigorous"):
        of_kinds([row], ["rigorus"])


def test_the_command_takes_kinds(tmp_path: Path) -> None:
    entries = {"a": CertificateEntry(0.1, "float64", 0.0, 0.0)}
    write_results(tmp_path, [replace(FULL, certificates=entries, certified_radius=0.1)], run={"model": "m"}, job="j")
    asked = ["check", str(tmp_path), "--min-certified", "0.05"]
    assert run([*asked, "--kind", "float64"]) == ExitCode.OK
    assert run([*asked, "--kind", "rigorous"]) == ExitCode.BELOW
    assert run([*asked, "--kind", "exact"]) == ExitCode.USAGE


def test_the_command_takes_units(tmp_path: Path) -> None:
    write_results(tmp_path, [replace(FULL, input_norm=30.0, token_norm=10.0)], run={"model": "m"}, job="j")
    assert run(["check", str(tmp_path), "--min-certified", "1% token"]) == ExitCode.OK
    assert run(["check", str(tmp_path), "--min-certified", "1.1% token"]) == ExitCode.BELOW
    assert run(["check", str(tmp_path), "--min-certified", "0.1 token"]) == ExitCode.USAGE
    assert run(["check", str(tmp_path), "--min-certified", "1% furlong"]) == ExitCode.USAGE


def test_the_worst_rows_are_named_first() -> None:
    rows = [replace(FULL, input_id=str(i), certified_radius=0.1 - 0.01 * i) for i in range(4)]
    verdict = judge(rows, Thresholds(min_certified=0.095))
    lines = worst(verdict, 2)
    assert [line[:1] for line in lines[:2]] == ["3", "2"]
    assert "certified radius 0.07 is below 0.095" in lines[0]
    assert lines[2] == "and 1 more"
