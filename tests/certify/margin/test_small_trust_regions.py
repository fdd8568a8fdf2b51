"""Many trust region problems at once."""

import pytest
import torch

from attnrobust.certify.margin.small_trust_regions import many_approximate, many_certified
from tests.margin_problems import random_quadratic


@pytest.mark.parametrize("size", [12, 110])
def test_many_small_trust_regions(size: int) -> None:
    drawn = [random_quadratic(seed, size) for seed in range(4)]
    matrix = torch.stack([m for m, _ in drawn])
    gradient = torch.stack([q.gradient for _, q in drawn])
    value, points, multiplier = many_approximate(matrix, gradient, 0.7)
    found = many_certified(matrix, gradient, 0.7, multiplier)
    points = points * (0.7 / points.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    reached = ((gradient * points).sum(-1) + 0.5 * torch.einsum("pld,lde,ple->pl", points, matrix, points)).amax(0)
    assert bool((found >= reached).all())
    assert bool((found <= value * 1.02).all())
    from_below = many_certified(matrix, gradient, 0.7, 0.2 * multiplier)
    assert bool((from_below >= reached).all())
