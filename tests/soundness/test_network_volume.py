"""The volume run on random small networks: a few seeds by default, and it sees a radius that is too large."""

from dataclasses import replace
from pathlib import Path

import pytest

from attnrobust.certify import certify
from attnrobust.results import CertificationReport
from benchmarks import network_soundness as networks
from benchmarks import soundness_volume as volume


def test_no_violation_on_the_first_seeds() -> None:
    rows = [networks.check(seed) for seed in (25, 39)]
    found = volume.summary(rows)
    assert found["violations"] == found["errors"] == []
    assert found["checks"] > 600
    assert {"network-lipschitz", "network-product", "network-chain"} <= set(found["checks_per_certificate"])
    assert networks.by_feature(rows)["Affine"][0] <= found["checks"]


@pytest.mark.slow
def test_no_violation_on_many_seeds(tmp_path: Path) -> None:
    volume.run(range(1000, 1060), tmp_path / "rows.jsonl", check_seed=networks.check)
    found = volume.summary(volume.read(tmp_path / "rows.jsonl"))
    assert found["violations"] == found["errors"] == []


def test_a_radius_that_is_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = certify

    def boastful(*args: object, **options: object) -> CertificationReport:
        report = honest(*args, **options, methods="network-chain")  # type: ignore[arg-type]
        return replace(report, certificates=tuple(replace(c, radius=10.0 * c.radius) for c in report.certificates))

    monkeypatch.setattr(networks, "certify", boastful)
    assert volume.summary([networks.check(seed) for seed in (39, 75)])["violations"]
