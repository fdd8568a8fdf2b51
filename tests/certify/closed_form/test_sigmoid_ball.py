"""The constant of sigmoid attention for measures."""

import pytest
import torch

from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_mean_field
from attnrobust.errors import InputError
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from tests.seeded_variants import sigmoid


def test_sigmoid_measures() -> None:
    """Local constants of weighted measures in W_2 stay below sigma(a + b) + a/2, and come within a factor 2.5."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for a in (-2.0, 0.5, 2.0):
        layer = SigmoidAttention(w_q=one, w_k=a * one, w_v=one, scale=1.0)
        bound, best = sigmoid_mean_field(layer, 1.0).value, 0.0
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            points = 2 * torch.rand(3, 1, generator=generator, dtype=torch.float64) - 1
            mass = torch.softmax(3 * torch.randn(3, generator=generator, dtype=torch.float64), 0)
            root = mass.sqrt()
            matrix = torch.func.jacrev(lambda x, m=mass, f=layer: f(x, m))(points)[:, 0, :, 0]
            best = max(best, float(torch.linalg.matrix_norm(root[:, None] * matrix / root, 2)))
        assert best <= bound <= 3.0 * best
    with pytest.raises(InputError, match="radius"):
        sigmoid_mean_field(sigmoid(0), -1.0)
