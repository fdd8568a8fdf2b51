"""Upper bounds of a trust region problem agree and are attained."""

import pytest
import torch

from attnrobust.certify.margin.trust_region import (
    approximate,
    decomposed_bound,
    factorised_bound,
    followed,
    iterated_bound,
)
from tests.margin_problems import random_quadratic


@pytest.mark.parametrize("seed", range(6))
def test_trust_region_bounds_are_upper_and_agree(seed: int) -> None:
    matrix, quadratic = random_quadratic(seed, 70)
    radius = (0.01, 0.3, 3.0)[seed % 3]
    exact, solution = decomposed_bound(quadratic, radius)
    inside = [x * min(1.0, radius / float(x.norm())) for x in solution.points]
    best = max(float(quadratic.gradient @ x + 0.5 * x @ matrix @ x) for x in inside)
    assert best <= exact.value * (1.0 + 1e-9)
    assert exact.value <= best * 1.001
    guess = approximate(quadratic, radius, torch.ones(1, 70, dtype=torch.float64), steps=35)
    for found in (
        factorised_bound(quadratic, radius, guess),
        iterated_bound(quadratic, radius, guess, failure_probability=1e-9, seed=seed),
    ):
        assert best * (1.0 - 1e-12) <= found.value <= exact.value * 1.02


@pytest.mark.parametrize("seed", range(3))
def test_spans_of_gradient_starts_and_residuals_hold_the_solution(seed: int) -> None:
    _, quadratic = random_quadratic(seed, 70)
    radius = (0.01, 0.3, 3.0)[seed % 3]
    exact = decomposed_bound(quadratic, radius)[1]
    near = exact.points[:1] + 0.03 * radius * torch.cos(torch.arange(70, dtype=torch.float64))
    few, many = (followed(quadratic, radius, near, expansions=count).value for count in (0, 25))
    assert few <= many * (1.0 + 1e-12)
    assert exact.value * (1.0 - 1e-3) <= many <= exact.value * (1.0 + 1e-9)
