"""Sequences and residuals against the same computed by hand, and inside a problem."""

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.normalisation import LayerNorm
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close, refused

D, N = 4, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def attention(width: int = D, out: int = D) -> Attention:
    return Attention(w_q=random(2, width, 2), w_k=random(2, width, 2), w_v=random(2, width, 3), w_o=random(2, 3, out))


def test_pre_norm_block() -> None:
    norm, layer = LayerNorm(weight=random(D), bias=random(D)), attention()
    block = Network((Residual(Network((norm, layer))), norm))
    x, mass = random(3, N, D), torch.softmax(random(N), dim=0)
    assert_close(block(x), norm(x + layer(norm(x))), rtol=1e-14)
    assert_close(block(x, mass), norm(x + layer(norm(x), mass)), rtol=1e-14)
    assert float((block(x, mass) - block(x)).abs().max()) > 1e-3
    assert isinstance(block, TokenMap)


def test_a_residual_of_nothing_is_the_identity() -> None:
    nothing = L2Attention(w_q=random(1, D, 2), w_v=torch.zeros(1, D, D))
    x = random(N, D)
    assert_close(Residual(nothing)(x), x, rtol=0.0)


def test_widths() -> None:
    first, second = attention(3, 4), attention(4, 6)
    network = Network((first, second))
    assert (network.width, network.out_width) == (3, 6)
    with refused(InputError, "layer 0", "3 to 4", "layer 1", "3 to 4"):
        Network((first, first))
    with refused(InputError, "equal widths", "4 to 6"):
        Residual(second)
    with refused(InputError, "at least one"):
        Network(())


def test_digests() -> None:
    first, second = attention(), attention()
    maps: list[TokenMap] = [
        first,
        Residual(first),
        Network((first,)),
        Network((first, second)),
        Network((second, first)),
        Network((Network((first, second)),)),
        Residual(Network((first, second))),
        Network((Residual(first), second)),
    ]
    assert len({one.digest for one in maps}) == len(maps)
    assert Network((first, second)).digest == Network((first, second)).digest


@pytest.mark.parametrize("masses", [False, True])
def test_can_be_attacked(masses: bool) -> None:
    block = Residual(Network((LayerNorm(weight=torch.ones(D)), attention())))
    points, mass = random(3, D), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    clean = TokenMeasure(points, mass) if masses else TokenMeasure(points)
    problem = Problem(block, clean, FrobeniusBall(), Displacement(tolerance=0.05, relative=True))
    result = attack(problem, budget=AttackBudget(restarts=2, steps=20))
    assert result.status is Status.FOUND
