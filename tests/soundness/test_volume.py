"""The volume run: a few seeds by default, and a check that it sees a certificate that is too large."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from attnrobust.certify import certify
from attnrobust.results import CertificationReport
from benchmarks import soundness_volume as volume


def test_no_violation_on_the_first_seeds(tmp_path: Path) -> None:
    volume.run(range(6), tmp_path / "rows.jsonl")
    found = volume.summary(volume.read(tmp_path / "rows.jsonl"))
    assert found["violations"] == []
    assert found["errors"] == []
    assert found["checks"] > 300


@pytest.mark.parametrize("kind", ["modern", "pre-norm"])
@pytest.mark.parametrize("count", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_no_violation_on_newer_layers(tmp_path: Path, kind: str, count: int) -> None:
    volume.run(range(3, 3 + count), tmp_path / "rows.jsonl", check_seed=partial(volume.check, kind=kind))
    found = volume.summary(volume.read(tmp_path / "rows.jsonl"))
    assert found["violations"] == []
    assert found["errors"] == []


@pytest.mark.slow
def test_no_violation_on_many_seeds(tmp_path: Path) -> None:
    volume.run(range(1000, 1200), tmp_path / "rows.jsonl")
    found = volume.summary(volume.read(tmp_path / "rows.jsonl"))
    assert found["violations"] == []
    assert found["errors"] == []


def test_a_radius_that_is_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = certify

    def boastful(*args: object, **options: object) -> CertificationReport:
        report = honest(*args, **options)  # type: ignore[arg-type]
        return replace(report, certificates=tuple(replace(c, radius=3e2 * c.radius) for c in report.certificates))

    monkeypatch.setattr(volume, "certify", boastful)
    assert volume.summary([volume.check(seed) for seed in range(6)])["violations"]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked: list[int] = []

    def record(seed: int) -> dict[str, object]:
        asked.append(seed)
        return {"seed": seed, "outcome": "refused"}

    for seeds in (range(3), range(5)):
        volume.run(seeds, tmp_path / "rows.jsonl", check_seed=record)
    assert asked == [0, 1, 2, 3, 4]
