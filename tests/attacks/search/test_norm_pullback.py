"""Closed forms of attention behind a norm, against automatic differentiation."""

import pytest
import torch

from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.norm_pullback import PreparedPreNorm
from attnrobust.goals import Displacement
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close
from tests.pre_norm_layers import pre_norm_layer
from tests.stress import Draw

N, D = 9, 6


@pytest.mark.parametrize("pool", ["all", 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_products_are_the_derivatives(seed: int, pool: int | str) -> None:
    draw = Draw(seed)
    layer = pre_norm_layer(draw, seed=seed, n=N, d=D)
    goal = Displacement(0.1, pool=3 if pool == 3 else "all")
    evaluator = Evaluator(
        [Problem(layer, TokenMeasure(draw.normal(N, D)), FrobeniusBall(), goal)], memory_bytes=1 << 28
    )
    at = slice(None) if evaluator.at is None else evaluator.at
    assert isinstance(evaluator.prepared, PreparedPreNorm)
    x, v = draw.normal(1, 3, N, D), draw.normal(1, 3, N, D)
    tape = evaluator.prepared.forward(x)
    output, pull = torch.func.vjp(lambda y: layer(y)[..., at, :], x)[:2]
    u = torch.ones_like(output)
    assert_close(tape.output, output, rtol=1e-12, what="output")
    assert_close(tape.pullback(u), pull(u)[0], rtol=1e-10, what="J^T u")
    assert_close((tape.pushforward(v) * u).sum(), (v * pull(u)[0]).sum(), rtol=1e-10, what="J v")
