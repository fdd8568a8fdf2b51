"""Ranges of logits and weights against what moves reach."""

import numpy as np

from attnrobust.certify.conic.ranges import row_ranges
from attnrobust.certify.conic.row import move_set
from attnrobust.threats.moves import FrobeniusBall
from tests.cases import case_named
from tests.conic_points import margin_problem, rows_for


def test_ranges_of_logits_and_weights_are_reached_within_a_factor() -> None:
    case = case_named("plain-h1-n5-d4")
    problem = margin_problem(case, FrobeniusBall(), row=0)
    (row,) = rows_for(problem, FrobeniusBall())
    ranges = row_ranges(row, move_set(FrobeniusBall(), 5, 4, 0.1))
    linear = np.linalg.norm(row.directions.reshape(5, -1), axis=1) * 0.1
    assert (ranges.logit >= linear).all()
    assert (ranges.logit <= 1.2 * linear + 0.02).all()
    assert (np.exp(ranges.log_low) <= row.weight).all()
    assert (row.weight <= np.exp(ranges.log_high)).all()
