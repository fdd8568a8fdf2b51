"""Outward rounding: the side of every function, and that what says nothing never becomes a small number."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import attnrobust
from attnrobust.numerics.rounding import (
    ENTRY,
    FORMULA,
    Share,
    inward,
    nan_is_infinite,
    outward,
    used_share,
    worst,
)

NAN, INF = math.nan, math.inf


def test_outward_and_inward_of_either_sign_and_of_every_kind() -> None:
    for value in (3.0, -3.0, 0.0):
        assert inward(value, ENTRY) <= value <= outward(value, ENTRY)
    assert outward(INF, FORMULA) == INF
    assert outward(-2.0, FORMULA) == pytest.approx(-2.0 * (1.0 - 1e-10), rel=1e-14)
    both = torch.tensor([2.0, -2.0], dtype=torch.float64)
    assert bool((outward(both, FORMULA) > both).all())
    assert bool((inward(both, FORMULA) < both).all())
    assert (outward(np.array([2.0, -2.0]), FORMULA) > np.array([2.0, -2.0])).all()


def test_a_factor_in_place_of_a_share_is_refused() -> None:
    for wrong in (1.0 + 1e-10, -1e-10, NAN):
        with pytest.raises(ValueError, match="share"):
            outward(1.0, Share(wrong))
        with pytest.raises(ValueError, match="share"):
            used_share(1.0, 2.0, share=Share(wrong))


@pytest.mark.parametrize(
    ("change", "budget"),
    [(NAN, 1.0), (INF, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, INF), (INF, INF), (0.0, INF), (1.0, -1.0), (1.0, NAN)],
)
def test_a_usage_that_says_nothing_is_infinite(change: float, budget: float) -> None:
    assert used_share(change, budget) == INF
    assert used_share(torch.tensor([0.1, change]), torch.tensor([1.0, budget])) == INF
    assert used_share([change, 0.1], [budget, 1.0]) == INF


def test_a_usage_is_the_largest_quotient_rounded_outward() -> None:
    assert used_share([1.0, 3.0, -5.0], [4.0, 4.0, 4.0]) == 0.75
    assert used_share(-1.0, 4.0) == 0.0
    assert 0.75 < used_share(3.0, 4.0, share=FORMULA) < 0.75 * (1.0 + 2e-10)
    assert used_share(0.0, 4.0, share=FORMULA) == 0.0


def test_nan_counts_as_infinite_in_maxima() -> None:
    assert worst([0.3, NAN, 0.1]) == INF  # max(0.3, nan) is 0.3
    assert worst([0.3, 0.1]) == 0.3
    assert worst([]) == 0.0
    assert nan_is_infinite(torch.tensor([1.0, NAN, -INF])).tolist() == [1.0, INF, -INF]


def test_no_file_has_a_rounding_factor_of_its_own() -> None:
    """A share and a factor of one name once lived in different files; importing the wrong one loses ten digits."""
    folder = Path(attnrobust.__file__).parent
    bare = re.compile(r"\b(OUTWARD|TINY)\b\s*=|\* \(1\.0 \+ 1e-\d{2,}\)|clamp_min\(1e-\d{2,}\)")
    areas = [
        folder / "numerics",
        *(folder / "certify" / name for name in ("shared", "displacement", "margin", "conic")),
    ]
    found = [
        f"{p.name}: {line}"
        for a in areas
        for p in a.rglob("*.py")
        for line in p.read_text().splitlines()
        if bare.search(line)
    ]
    assert not found
