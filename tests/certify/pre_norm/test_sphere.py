"""Lemmas N1 to N3: no move leaves what they say, and moves reach it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.pre_norm.own_moves import OwnMoves
from attnrobust.certify.pre_norm.sphere import Ellipsoids, NormFront
from attnrobust.layers.normalisation import LayerNorm
from attnrobust.layers.pre_norm import PreNormAttention
from tests.pre_norm_layers import pre_norm_layer
from tests.stress import Draw


def front(seed: int) -> tuple[NormFront, Draw]:
    draw = Draw(seed)
    layer = pre_norm_layer(draw, seed=seed, n=4, d=5)
    points = draw.normal(4, 5) * torch.tensor([0.3, 1.0, 3.0, 9.0])[:, None]
    return NormFront(layer, points, torch.tensor([True, True, False, True])), draw


def moves(found: NormFront, draw: Draw, share: float) -> tuple[Tensor, float]:
    """Moves of one size together: random ones, along the tokens, across them, of one token alone."""
    radius = share * float(found.lengths[found.movable].min())
    many = draw.normal(400, 4, 5)
    along = (many * found.direction).sum(-1, keepdim=True) * found.direction
    many = torch.cat([many, along, many - along, many + 30.0 * along])
    single = many * torch.nn.functional.one_hot(torch.arange(len(many)) % 4, 4)[..., None]
    many = torch.cat([many, single]) * found.movable[:, None]
    length = torch.linalg.vector_norm(many, dim=(-2, -1), keepdim=True)
    return (many * radius / length)[length.flatten() > 0], radius


def image(layer: PreNormAttention, found: NormFront, delta: Tensor) -> Tensor:
    return layer.unit(found.points + delta) - layer.unit(found.points)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(6))
def test_no_move_leaves_the_bounds(seed: int, share: float) -> None:
    found, draw = front(seed)
    delta, radius = moves(found, draw, share)
    moved = image(found.layer, found, delta)
    lengths, own = torch.linalg.vector_norm(moved, dim=-1), torch.linalg.vector_norm(delta, dim=-1)
    assert bool((lengths <= found.relative * found.steepness(radius) * own * (1 + 1e-9) + 1e-12).all())
    ellipsoids = Ellipsoids.near(found, 0.5 * radius)
    back = preimage(ellipsoids, moved)
    assert float(torch.linalg.vector_norm(back, dim=(-2, -1)).max()) <= ellipsoids.reach(radius) * (1 + 1e-9)
    readout = OwnMoves(found, draw.normal(4, 5) * found.movable[:, None])
    free = delta - tangential(found, delta)
    together = (back.square().sum((-2, -1)) + (found.steepest**2) * free.square().sum((-2, -1))).sqrt()
    assert float(together.max()) <= ellipsoids.reach(radius, free=True) * (1 + 1e-9)
    exact = (readout.readout * delta).sum((-2, -1))
    claimed = (readout.tangential * back).sum((-2, -1)) / found.steepest
    claimed = claimed + readout.unseen * torch.linalg.vector_norm(free, dim=(-2, -1)) + readout.error(radius)
    assert bool((exact <= claimed + 1e-9 * radius).all())


def tangential(found: NormFront, delta: Tensor) -> Tensor:
    centred = found.layer.centred(delta)
    return centred - (centred * found.direction).sum(-1, keepdim=True) * found.direction


def preimage(ellipsoids: Ellipsoids, moved: Tensor) -> Tensor:
    """d' with ``T d' = moved``."""
    found = ellipsoids.front
    along = (moved * found.direction).sum(-1, keepdim=True) * found.direction
    scaled = moved + along * (1.0 / ellipsoids.shrink[:, None] - 1.0)
    return torch.where(found.movable[:, None], scaled / found.relative.clamp_min(1e-300)[:, None], 0.0)


def test_small_moves_across_a_token_reach_the_bounds() -> None:
    found, draw = front(1)
    layer = replace(found.layer, norm=replace(found.layer.norm, eps=1e-6))
    found = replace(found, layer=layer)
    delta = tangential(found, draw.normal(4, 5)) * torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    radius = 1e-3 * float(found.lengths[0])
    delta = delta * radius / delta.norm()
    moved = image(found.layer, found, delta)
    assert float(moved[0].norm()) >= 0.999 * float(found.relative[0]) * found.steepness(radius) * radius
    ellipsoids = Ellipsoids.near(found, radius)
    assert float(preimage(ellipsoids, moved).norm()) >= 0.99 * ellipsoids.reach(radius)


def test_moves_as_long_as_a_token_are_not_covered() -> None:
    found, _ = front(0)
    radius = float(found.lengths.min()) * 1.01
    assert not found.covers(radius)
    assert found.steepness(radius) == Ellipsoids.near(found, 1.0).reach(radius) == torch.inf


def test_the_direction_of_a_token_that_is_constant_up_to_rounding_is_centred() -> None:
    """Else the map to the parts across it is not symmetric, as the eigenvalue bounds take it to be."""
    found, _ = front(0)
    value = torch.linspace(0.1, 9.0, 200, dtype=torch.float64)[:, None]
    above = torch.nextafter(value, 2.0 * value)
    points = torch.cat([above, above, above, value, value], dim=1)
    layer = replace(found.layer, norm=LayerNorm(weight=found.layer.norm.weight))
    direction = NormFront(layer, points, torch.ones(200, dtype=torch.bool)).direction
    assert float((layer.centred(direction) - direction).abs().max()) <= 1e-12
