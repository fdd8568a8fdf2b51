"""Everyday units: shares of the right norm, sentences that never promise more than the radii do."""

from dataclasses import replace

import pytest

from attnrobust.reports.units import both_in_tokens, both_shares, row_verdict, run_verdicts, safe, scale_note
from attnrobust.runs.rows import Row, row_from_dict
from attnrobust.runs.yardsticks import as_json, in_tokens, in_words, share, yardstick
from tests.runs.storage.test_files import EMPTY, FULL

ROW = replace(FULL, input_norm=30.0, token_norm=10.0, certificate_kind="float64")


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        ("frobenius", (30.0, "the input's norm")),
        ("tokens:0,2", (30.0, "the input's norm")),
        ("any-token", (10.0, "the median token norm")),
        ("per-token", (10.0, "the median token norm")),
        ("token:1", (10.0, "the median token norm")),
        ("per-token-linf", None),
        ("wasserstein:2", None),
    ],
)
def test_a_threat_is_measured_by_what_it_moves(threat: str, expected: tuple[float, str] | None) -> None:
    row = replace(ROW, threat=threat)
    assert yardstick(row) == expected
    assert share(3.0, row) == (None if expected is None else 3.0 / expected[0])


def test_numbers_round_to_the_safe_side() -> None:
    assert (safe(0.3149, up=False), safe(0.3141, up=True)) == ("0.314", "0.315")
    assert (safe(99.99, up=False), safe(0.0, up=False)) == ("99.9", "0")


def test_the_sentence_of_one_input() -> None:
    assert both_shares(ROW) == "0.333% to 1%"
    assert row_verdict(ROW) == (
        "0001-ab: no move of all tokens together below 0.333% of the input's norm (1% of the median token norm) "
        "changes the output by 10%; 1% of the input's norm (3% of the median token norm) was found to"
    )
    word = replace(ROW, threat="any-token", goal="decision", attack_radius=None, certificate_kind="probabilistic")
    assert row_verdict(word) == (
        "0001-ab: no move of any one token below 1% of the median token norm changes the model's decision "
        "(probabilistic); no violation was found"
    )
    assert row_verdict(EMPTY) is None


def test_a_run_is_as_good_as_its_worst_input_and_groups_stay_apart() -> None:
    worse = replace(ROW, input_id="0002", certified_radius=0.06, attack_radius=0.2)
    other = replace(ROW, threat="per-token-linf")
    first, second = run_verdicts([ROW, worse, other, replace(EMPTY, threat="frobenius", goal=ROW.goal)])
    assert first.startswith("encoder.layer.0, all 2 inputs (1 more have no radius): no move of all tokens together")
    assert "below 0.2% of the input's norm" in first
    assert "0.667% of the input's norm (2% of the median token norm) was found" in first
    assert "no change within per-token-linf below size 0.1 changes" in second


def test_radii_against_a_token_and_against_the_nearest_other_word() -> None:
    row = replace(ROW, word_distance=0.4)
    assert both_in_tokens(row) == "1% to 3%"
    assert in_words(row.certified_radius, row) == pytest.approx(0.01 / 0.4)
    assert scale_note([row, replace(row, word_distance=0.5), ROW]) == (
        "for scale: in the model's embedding table the nearest other word is 40% to 50% of a word's own norm away "
        "(median over an input's tokens)"
    )
    assert scale_note([ROW]) is None
    for threat in ("per-token-linf", "copies:2", "wasserstein:2", "coupling:1"):
        other = replace(row, threat=threat)
        assert in_tokens(0.1, other) is in_words(0.1, other) is None
        assert both_in_tokens(other) == "-"


def test_json_has_every_unit_and_gives_the_row_back() -> None:
    values = as_json(replace(ROW, word_distance=0.4))
    assert values["units"] == pytest.approx({
        "certified_of_input_norm": 0.1 / 30, "certified_of_token_norm": 0.01, "certified_of_nearest_word": 0.025,
        "attack_of_input_norm": 0.01, "attack_of_token_norm": 0.03, "attack_of_nearest_word": 0.075,
    })  # fmt: skip
    assert row_from_dict(values) == replace(ROW, word_distance=0.4)


def test_an_input_whose_goal_fails_without_a_move_is_no_attack() -> None:
    failing = replace(ROW, status="misclassified", certified_radius=0.0, attack_radius=0.0)
    assert row_verdict(failing) == "0001-ab: the goal fails at the clean input itself, without any move"
    (told,) = run_verdicts([ROW, failing])
    assert "all 1 input (the goal of 1 more fails without any move): no move of all tokens together below" in told
    assert run_verdicts([failing]) == []


def test_what_is_not_certified_is_not_promised() -> None:
    rows: list[Row] = [ROW, replace(ROW, certified_radius=0.0)]
    (told,) = run_verdicts(rows)
    assert "nothing is certified" in told
    assert "no move" not in told
