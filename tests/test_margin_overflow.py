"""The margin certificates where their constants overflow: never a usage that an attack exceeds."""

import pytest
import torch

from attnrobust.attacks import attack
from attnrobust.certify import method_named
from attnrobust.goal import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threat import FrobeniusBall
from attnrobust.tokens import TokenMeasure


def _problem(bias: float) -> Problem:
    """Wide enough (2 k > 24) for matrix powers, flat enough for radii at which exponentials overflow."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d, k = 32, 16
    layer = Attention(w_q=normal(1, d, k) / d**0.5, w_k=normal(1, d, k) / d**0.5, w_v=normal(1, d, 2) / d**0.5)
    tokens = TokenMeasure(normal(4, d))
    readout = Margin(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([bias, -bias]))
    return Problem(layer, tokens, FrobeniusBall((1,)), readout)


@pytest.mark.parametrize("method", ["margin-one-token", "margin-majorant"])
@pytest.mark.parametrize("radius", [36.0, 40.0, 45.0, 60.0, 400.0])
def test_overflow_is_no_certificate(method: str, radius: float) -> None:
    problem = _problem(1.0)
    bound = method_named(method).prepare(problem, seed=0)
    found = attack(problem, epsilon=radius)
    assert found.usage > 1.0, "the case must be one that an attack wins"
    assert bound.usage(radius).value >= found.usage
