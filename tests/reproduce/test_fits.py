"""Exponents and their intervals."""

import numpy as np
import pytest

from attnrobust.reproduce.fits import power_law


def test_intervals_hold_the_exponent_as_often_as_they_say() -> None:
    generator, x = np.random.default_rng(0), np.array([8.0, 16.0, 32.0, 64.0, 128.0])
    inside = 0
    for _ in range(400):
        law = power_law(list(x), list(3.0 * x**0.25 * np.exp(0.2 * generator.normal(size=5))))
        inside += law.low <= 0.25 <= law.high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_band() -> None:
    law = power_law([1.0, 2.0, 4.0, 8.0], [1.1, 1.9, 4.2, 7.8])
    middle, low, high = law.at(2.0**1.5)
    assert low < middle < high
    assert middle / low == pytest.approx(high / middle)
    ends = law.at(100.0)
    assert ends[2] / ends[0] > high / middle
