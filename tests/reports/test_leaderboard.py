"""Ranks, groups and pages of results."""

import pytest

from attnrobust.errors import InputError
from attnrobust.reports.leaderboard import leaderboard, page
from tests.protocol_cases import SMALL, document


def test_ranked_over_the_same_inputs_alone() -> None:
    board = leaderboard({
        "a": document("a"),
        "b": document("b", entry={"median_certified": 0.03}),
        "c": document("c", entry={"median_certified": 0.5, "unsound": 1}),
        "d": document("d", inputs={"digest": "j", "each": []}),
    })  # fmt: skip
    ranks = [[(line.model, line.rank) for line in group.lines] for group in board.groups]
    assert ranks == [[("b", 1), ("a", 2), ("c", None)], [("d", 1)]]


def test_versions_are_not_mixed() -> None:
    other = document(protocol=SMALL.as_dict() | {"version": 10})
    with pytest.raises(InputError, match=r"standard 9 \(a\), standard 10 \(b\)"):
        leaderboard({"a": document(), "b": other})


def test_pages_hold_names_as_text() -> None:
    board = leaderboard({"a": document("<b>x|y")})
    assert "&lt;b&gt;x|y" in page(board, html=True)
    assert "&lt;b&gt;x\\|y | l | 3 | 1 % | 2 % | 2 |" in page(board, html=False)
    assert "<b>" not in page(board, html=True) + page(board, html=False)
