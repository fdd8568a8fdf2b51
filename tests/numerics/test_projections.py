"""The common drop against a fine search of the nearest point."""

import pytest
import torch

from attnrobust.numerics.projections import shortened
from attnrobust.numerics.triangle import product_norm, triangle
from tests.stress import Draw


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_nearest_lengths_inside_the_ball(seed: int, weighted: bool) -> None:
    draw = Draw(seed)
    length = draw.normal(7).abs()
    weight = torch.softmax(draw.normal(7), 0) if weighted else None
    ones = torch.ones(7, dtype=torch.float64) if weight is None else weight
    budget = 0.4 * float((ones * length).sum())
    found = shortened(length, budget, weight)
    assert float((ones * found).sum()) == pytest.approx(budget, rel=1e-12)
    assert bool((found >= 0.0).all())
    others = draw.normal(4000, 7).abs() * length
    others = others * (budget / (ones * others).sum(-1, keepdim=True)).clamp_max(1.0)
    distances = (ones * (others - length).square()).sum(-1)
    assert float((ones * (found - length).square()).sum()) <= float(distances.min())


def test_lengths_inside_stay_bit_for_bit_and_rows_are_independent() -> None:
    length = torch.tensor([[0.1, 0.2, 0.3], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = shortened(length, torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64))
    assert torch.equal(found[0], length[0])
    assert found[1].tolist() == [2.0, 0.0, 0.0]
    assert not found[2].any()


def test_the_triangle_keeps_norms_of_tall_and_wide_matrices() -> None:
    draw = Draw(3)
    for shape in ((9, 3), (3, 9), (4, 4)):
        left, right, x = draw.normal(2, *shape), draw.normal(2, *shape), draw.normal(2, shape[1], 1)
        torch.testing.assert_close((triangle(left) @ x).norm(dim=1), (left @ x).norm(dim=1))
        torch.testing.assert_close(product_norm(left, right), torch.linalg.matrix_norm(left @ right.mT, 2))
