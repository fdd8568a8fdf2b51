from dataclasses import FrozenInstanceError, replace

import pytest

from attnrobust.results import Certificate, CertificationReport, Kind, NotApplicable, Status

BASE = Certificate(
    problem="p",
    method="a",
    kind=Kind.FLOAT64,
    failure_probability=0.0,
    radius=1.0,
    region="everywhere",
    reference="derived",
    seconds=0.0,
    evaluations=1,
)


def report(*certificates: Certificate) -> CertificationReport:
    return CertificationReport("p", certificates, (NotApplicable("z", "not for this threat"),), 0.0)


def test_best_has_the_largest_radius() -> None:
    larger = replace(BASE, method="b", radius=2.0)
    assert report(BASE, larger, replace(BASE, method="c", radius=0.5)).best is larger


def test_a_sure_certificate_is_best_among_equals() -> None:
    chance = replace(BASE, method="b", kind=Kind.PROBABILISTIC, failure_probability=1e-9)
    rarer = replace(chance, method="c", failure_probability=1e-12)
    assert report(chance, BASE, rarer).best is BASE
    assert report(chance, rarer).best is rarer


def test_a_larger_radius_counts_more_than_its_kind() -> None:
    chance = replace(BASE, method="b", kind=Kind.PROBABILISTIC, failure_probability=1e-9, radius=1.1)
    assert report(BASE, chance).best is chance


def test_no_certificate_is_no_best() -> None:
    assert report().best is None


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        BASE.radius = 2.0  # type: ignore[misc]


def test_statuses_and_kinds_are_their_text() -> None:
    """They go to files and JSON as text; a renamed value would break stored results."""
    statuses = {"found", "certified", "not_found", "misclassified", "nan", "timeout", "error", "unsound"}
    assert {str(status) for status in Status} >= statuses
    assert {str(kind) for kind in Kind} == {"float64", "rigorous", "probabilistic"}
    assert Status("found") is Status.FOUND
