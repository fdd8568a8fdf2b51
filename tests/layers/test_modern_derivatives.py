"""Derivatives of layers with rotary positions, position biases and windows against automatic differentiation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

from attnrobust.attacks.search.prepared_network import FusedAttention
from attnrobust.attacks.search.pullback import PreparedAttention, covers
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.attend import Attend, AttentionState
from attnrobust.layers.jacobian import AttentionJacobian
from tests.assertions import assert_close
from tests.modern_layers import modern
from tests.stress import Draw


def problem(seed: int) -> tuple[Attention, Tensor, Tensor, Draw]:
    """A layer with every kind of bias, two inputs of four tokens and their masses."""
    draw = Draw(seed)
    heads, d, k = 2, 3, 4
    given: dict[str, Any] = {name: draw.normal(heads, d, k) for name in ("w_q", "w_k", "w_v")}
    given |= {name: draw.normal(heads, k) for name in ("b_q", "b_k", "b_v")}
    layer = modern(Attention(**given, w_o=draw.normal(heads, k, 5)), draw, 4)
    return layer, draw.normal(2, 4, d), torch.softmax(draw.normal(2, 4), dim=-1), draw


def pushed(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, *, again: bool = False) -> Tensor:
    image: Tensor = jvp(function, x, v, create_graph=again)[1]  # type: ignore[no-untyped-call,unused-ignore]
    return image


@pytest.mark.parametrize("seed", range(6))
def test_products_are_those_of_autograd(seed: int) -> None:
    layer, points, mass, draw = problem(seed)
    jacobian = AttentionJacobian(layer, points, mass)
    v, u = draw.normal(2, 4, 3), draw.normal(2, 4, 5)
    assert_close(jacobian.matvec(v), pushed(lambda x: layer(x, mass), points, v), rtol=1e-11, what="J v")
    pulled = torch.func.vjp(lambda x: layer(x, mass), points)[1](u)[0]
    assert_close(jacobian.rmatvec(u), pulled, rtol=1e-11, what="J^T u")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_attacks_tape_is_the_layer(seed: int, weighted: bool) -> None:
    """Two heads and two problems: biases of heads must not be read as those of problems."""
    layer, points, mass, draw = problem(seed)
    assert covers(layer)
    x, u, v = points[:, None], draw.normal(2, 1, 4, 5), draw.normal(2, 1, 4, 3)
    tape = PreparedAttention(layer, 4, mass if weighted else None).forward(x)
    given = mass[:, None] if weighted else None
    output, pull = torch.func.vjp(lambda y: layer(y, given), x)[:2]
    assert_close(tape.output, output, rtol=1e-12, what="output")
    assert_close(tape.pullback(u), pull(u)[0], rtol=1e-11, what="J^T u")
    assert_close(tape.pushforward(v), pushed(lambda y: layer(y, given), x, v), rtol=1e-11, what="J v")
    both = (tape.query_pushforward(v) * u).sum(), (v * tape.query_pullback(u)).sum()
    assert_close(both[0], both[1], rtol=1e-11, what="own queries")
    fused = FusedAttention(layer, torch.float64)((points,), mass if weighted else None)
    assert_close(fused, output[:, 0], rtol=1e-12, what="fused forward")


@pytest.mark.parametrize("seed", range(3))
def test_the_second_derivative_of_the_node(seed: int) -> None:
    layer, points, _, draw = problem(seed)
    state, a, b, y = Attend(layer).at((points[0],)), draw.normal(4, 3), draw.normal(4, 3), draw.normal(4, 5)
    expected = pushed(lambda x: pushed(layer, x, a, again=True), points[0], b)
    one, two = state.features((a,)), state.features((b,))
    assert_close(state.bilinear(one, two), expected, rtol=1e-10, what="f''[a, b]")
    adjoint = (state.bilinear_adjoint(one, y)[0] * b).sum()
    assert_close(adjoint, (expected * y).sum(), rtol=1e-10, what="its adjoint")


@pytest.mark.parametrize("seed", range(3))
def test_every_order_of_the_node(seed: int) -> None:
    """Under masses: value, first and third order, and their adjoints."""
    layer, points, mass, draw = problem(seed)
    node, x, m = Attend(layer), points[0], mass[0]
    state, a, b, c, y = node.at((x,), m), *(draw.normal(4, 3) for _ in range(3)), draw.normal(4, 5)

    def value(z: Tensor) -> Tensor:
        return node.forward((z,), m)

    def second(z: Tensor) -> Tensor:
        return pushed(lambda w: pushed(value, w, a, again=True), z, b, again=True)

    first, third = pushed(value, x, a), pushed(second, x, c)
    assert_close(value(x), layer(x, m), rtol=1e-13, what="value")
    assert_close(state.jvp((a,)), first, rtol=1e-11, what="first order")
    assert_close((state.vjp(y)[0] * a).sum(), (first * y).sum(), rtol=1e-10, what="its adjoint")
    assert_close(state.third((a,), (b,), (c,)), third, rtol=1e-9, what="third order")
    assert_close((state.third_adjoint((a,), (b,), y)[0] * c).sum(), (third * y).sum(), rtol=1e-9, what="its adjoint")
    assert isinstance(state, AttentionState)
    logits = draw.normal(*state.jacobian.weights.shape)
    pulled = (state.logits_adjoint(logits)[0] * a).sum()
    assert_close(pulled, (state.features((a,)).logits * logits).sum(), rtol=1e-10, what="adjoint of the scores")
