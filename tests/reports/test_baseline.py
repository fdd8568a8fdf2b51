"""A baseline: medians over the inputs that both runs have, the worst first."""

from dataclasses import replace

from attnrobust.reports.baseline import worse_than
from tests.runs.storage.test_files import FULL

BEFORE = [replace(FULL, input_id=str(i), layer=layer, certified_radius=1.0) for layer in "ab" for i in range(3)]


def test_equal_runs_pass_and_smaller_radii_are_named() -> None:
    assert worse_than(BEFORE, BEFORE, allowed=0.0) == []
    after = [replace(row, certified_radius={"a": 0.97, "b": 0.5}[row.layer]) for row in BEFORE]
    assert worse_than(after, BEFORE, allowed=0.6) == []
    assert [line[:1] for line in worse_than(after, BEFORE, allowed=0.01)] == ["b", "a"]
    (line,) = worse_than(after, BEFORE, allowed=0.05)
    assert line == "b, frobenius, displacement 10%: median certified radius 0.5 is 50.0% below the baseline's 1"


def test_only_common_inputs_count_and_missing_layers_are_told() -> None:
    after = [replace(BEFORE[0], certified_radius=1.0), replace(BEFORE[1], input_id="new", certified_radius=0.1)]
    (line,) = worse_than(after, BEFORE, allowed=0.01)
    assert line == "b, frobenius, displacement 10%: none of the baseline's 3 inputs is there"
