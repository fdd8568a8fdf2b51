"""Every node kind: no move inside the given radii exceeds its bounds, and ascent comes near where they are tight."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.node_bounds.node_bound import readout_of
from attnrobust.certify.network.node_bounds.registry import NODE_FEATURES, bound_of
from attnrobust.certify.network.node_bounds.state_move import no_move, token_move
from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    Attend,
    ConcatTokens,
    Node,
    Normalise,
    PoolMean,
    PoolRow,
    Product,
    Scale,
    Step,
    Sum,
)
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.numerics.chance import Chance
from tests.certify.network.node_bounds.ascent import NodeAt, largest, radii
from tests.layers.graph.networks import ACTIVATIONS, network

N, D = 3, 4
SIZES = ((1e-3, 1.0, None), (0.4, 0.6, 0), (5.0, 1.0, None))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def attention(strength: float = 1.0, **options: Any) -> Attention:
    weights: dict[str, Any] = {name: draw(2, D, 3) for name in ("w_q", "w_k", "w_v")}
    weights["w_q"] = strength * weights["w_q"]
    return Attention(**weights, **options)


def hidden_keys() -> Tensor:
    return torch.where(torch.eye(N).bool() | (draw(N, N) > 0), draw(N, N), -math.inf)


NODES: dict[str, Callable[[], Node]] = {
    "affine": lambda: Affine(draw(D, 5), draw(5)),
    "scale": lambda: Scale(draw(D)),
    "sum": Sum,
    "product": Product,
    "row": lambda: PoolRow(1),
    "mean": PoolMean,
    "fixed tokens": lambda: ConcatTokens(draw(2, D), mass=torch.tensor([0.2, 0.3], dtype=torch.float64)),
    "positions": lambda: AddPositions(draw(7, D)),
    "layer norm": lambda: Normalise(LayerNorm(draw(D), draw(D))),
    "flat layer norm": lambda: Normalise(LayerNorm(torch.ones(D, dtype=torch.float64), eps=10.0)),
    "rms norm": lambda: Normalise(RMSNorm(draw(D), eps=1e-12)),
    "attention": lambda: Attend(attention(b_q=draw(2, 3), w_o=draw(2, 3, D))),
    "concatenated heads": lambda: Attend(attention()),
    "masked attention": lambda: Attend(attention(mask=hidden_keys(), w_o=draw(2, 3, D))),
    "causal attention": lambda: Attend(attention(causal=True)),
    "saturated attention": lambda: Attend(attention(30.0)),
} | {name: (lambda name=name: Activate(name)) for name in (*ACTIVATIONS, "identity")}
WITH_MASSES = {"mean", "fixed tokens", "attention"}
TIGHT = {"affine", "scale", "sum", "positions", "row", "mean", "fixed tokens"}


def placed(name: str) -> NodeAt:
    node = NODES[name]()
    mass = torch.softmax(draw(N), dim=0) if name in WITH_MASSES else None
    return NodeAt(node, tuple(draw(N, D) for _ in range(node.arity)), mass)


def whole(output: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(output, dim=(-2, -1))
    return norms


def longest(output: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(output, dim=-1).amax(dim=-1)
    return norms


@pytest.mark.parametrize(("size", "share", "still"), SIZES)
@pytest.mark.parametrize("name", NODES)
@pytest.mark.one_in(3)
def test_no_move_exceeds_its_bounds(name: str, size: float, share: float, still: int | None) -> None:
    torch.manual_seed(7)
    at = placed(name)
    bound, within = at.bound(), tuple(radii(N, D, size, share=share, still=still) for _ in at.inputs)
    moved, rest = bound.move(*within), bound.remainder(*within)
    reached = largest(at.change, whole, within)
    assert reached <= moved.frobenius * (1 + 1e-9)
    if name in TIGHT and still is None:
        assert reached >= 0.97 * moved.frobenius
    assert largest(at.change, longest, within) <= float(moved.tokens.max()) * (1 + 1e-9)
    assert largest(at.change, lambda output: output.abs().amax(dim=(-2, -1)), within) <= float(moved.entries.max()) * (
        1 + 1e-9
    )
    cancelled = 1e-13 * (1.0 + size)  # f(x + e) - f(x) - f'(x) e is a difference
    assert largest(at.remainder, whole, within) <= rest.frobenius * (1 + 1e-9) + cancelled
    assert largest(at.remainder, longest, within) <= float(rest.tokens.max()) * (1 + 1e-9) + cancelled
    cotangent = draw(*at.change(*map(torch.zeros_like, at.inputs)).shape)
    read = float(bound.readout(cotangent[None], *within))
    assert read <= float(readout_of(cotangent[None], rest)) * (1 + 1e-9)
    found = largest(at.remainder, lambda output: (output * cotangent).sum(dim=(-2, -1)), within)
    assert found <= read * (1 + 1e-9) + 10 * cancelled


@pytest.mark.parametrize("name", ["gelu", "relu", "product", "layer norm", "rms norm"])
def test_remainders_are_nearly_reached(name: str) -> None:
    torch.manual_seed(3)
    at = placed(name)
    size = 2.0 if name == "relu" else 0.02
    within = tuple(radii(N, D, size) for _ in at.inputs)
    assert largest(at.remainder, whole, within) >= 0.7 * at.bound().remainder(*within).frobenius


@pytest.mark.parametrize("name", NODES)
def test_what_does_not_move_moves_nothing(name: str) -> None:
    at = placed(name)
    bound, still = at.bound(), tuple(no_move(x) for x in at.inputs)
    assert bound.move(*still).frobenius == bound.remainder(*still).frobenius == 0.0


@pytest.mark.parametrize("name", NODES)
def test_unknown_moves_are_bounded_by_infinity_or_by_what_saturates(name: str) -> None:
    at = placed(name)
    far = tuple(token_move(math.inf, torch.full((N,), math.inf, dtype=torch.float64), D) for _ in at.inputs)
    moved = at.bound().move(*far)
    assert not math.isnan(moved.frobenius)
    assert moved.frobenius < math.inf or name not in ("layer norm", "rms norm")
    assert not bool(torch.isnan(at.bound().readout(torch.ones(1, *moved.entries.shape, dtype=torch.float64), *far)))


def test_weighted_remainders_of_an_activation_behind_a_matrix() -> None:
    torch.manual_seed(1)
    first, x = Affine(draw(D, 6)), draw(N, D)
    given = NodeAt(first, (x,)).bound().move(radii(N, D, 0.3))
    at = NodeAt(Activate("gelu"), (first.forward((x,)),))
    weights = draw(N, 6).exp()
    bound = at.bound().weighted_remainder(weights, given)
    inner = radii(N, D, 0.3)
    found = largest(lambda e: weights * at.remainder(e @ first.weight), whole, (inner,))
    assert 0.3 * bound < found <= bound
    assert bound <= float(weights.max()) * at.bound().remainder(given).frobenius * (1 + 1e-9)


def test_a_node_that_came_later_is_refused() -> None:
    class Later(Scale):
        """A subclass that may compute anything."""

    graph = network("post", 1, "gelu")
    clean = graph.linearise(draw(N, 4))
    step = Step("later", Later(2.0), ("input",))
    with pytest.raises(UnsupportedModelError, match="Later"):
        bound_of(step, clean, Chance(0, "test", 1e-9, 8))
    assert not Later(2.0).features <= NODE_FEATURES
