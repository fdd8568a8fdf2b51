"""Every experiment runs at its smallest size, is sound, and says what it means."""

from pathlib import Path

import pytest

from attnrobust.errors import UnknownNameError
from attnrobust.reproduce.experiment import Experiment, Setting, Size
from attnrobust.reproduce.registry import EXPERIMENTS, experiment_named
from attnrobust.reproduce.run import run_experiment

QUICK = {"kim2021-lipschitz"}
CASES = [
    pytest.param(e, id=e.name, marks=() if e.name in QUICK else (pytest.mark.slow,)) for e in EXPERIMENTS
]  # fmt: skip


@pytest.mark.parametrize("experiment", CASES)
def test_the_smallest_size(experiment: Experiment, tmp_path: Path) -> None:
    outcome = run_experiment(experiment, tmp_path, setting=Setting(size=Size.TINY))
    outcome.require_sound()
    assert all(any(low in row for row in outcome.rows) for low, _ in experiment.sides)
    assert len(outcome.verdicts) >= 2
    assert all(verdict.ours and verdict.reason for verdict in outcome.verdicts)


def test_names() -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert all(experiment_named(name).name == name for name in names)
    with pytest.raises(UnknownNameError, match="kim2021-lipschitz"):
        experiment_named("kim2021-lipshitz")


def test_default_and_full_sizes_differ_in_what_they_compute() -> None:
    for experiment in EXPERIMENTS:
        sizes = [experiment.parts(Setting(size=size)) for size in Size]
        configs = [{part.name: dict(part.config) for part in parts} for parts in sizes]
        assert configs[0] != configs[1] != configs[2], experiment.name
        assert all(len({part.name for part in parts}) == len(parts) for parts in sizes)
