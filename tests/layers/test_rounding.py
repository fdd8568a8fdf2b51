"""The rounding of rows on their own: that of all rows where the goal looks, an estimate elsewhere."""

import pytest
import torch

from attnrobust.layers import rounding
from attnrobust.layers.rounding import ESTIMATE, output_rounding
from tests.assertions import assert_close
from tests.layers.test_modern_derivatives import problem

ROW = torch.nn.functional.one_hot(torch.tensor(2), 4).to(torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_asked_row_alone(seed: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is off by more than its rounding is charged for it."""
    layer, points, masses, _ = problem(seed)
    x, mass = points[0], masses[0] if weighted else None
    output = layer(x, mass)
    assert_close(layer.rows(x, torch.tensor([2, 0]), mass), output[[2, 0]], rtol=1e-13, what="rows")
    whole = output_rounding(layer, x, mass, output, asked=ROW)
    monkeypatch.setattr(rounding, "FEWER", 4)
    own = output_rounding(layer, x, mass, output, asked=ROW)
    assert bool((own[2] >= 0.5 * whole[2]).all())
    assert bool((own[2] <= 2.0 * whole[2]).all())
    estimate = ESTIMATE * torch.linalg.vector_norm(output, dim=-1, keepdim=True)
    assert torch.equal(own[[0, 1, 3]], estimate.expand_as(output)[[0, 1, 3]])
    shifted = output_rounding(layer, x, mass, output + 1e-3, asked=ROW)
    assert bool((shifted[2] >= 1e-3).all())
