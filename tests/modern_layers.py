"""Random layers of the kinds that people run: rotary positions, position biases, windows and grouped keys, combined."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnrobust.goals import Margin, pool_weights
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Layout, Rotary
from attnrobust.problem import Problem
from tests.stress import Draw


def random_rotary(draw: Draw, *, n: int, k: int) -> Rotary:
    """Full or partial turns, both layouts, any offset, or explicit angles; a plane in three barely turns."""
    planes = draw.integer(1, k // 2)
    frequencies = draw.normal(planes).abs() * 10 ** draw.between(-2.0, 0.5)
    layout: Layout = ("half", "interleaved")[draw.integer(0, 1)]
    if draw.integer(0, 3) == 0:
        places = 5.0 * draw.normal(n).abs()
        return Rotary(angles=places[:, None] * frequencies, layout=layout)
    return Rotary(frequencies, layout=layout, offset=draw.integer(-3, 40))


def random_head_bias(draw: Draw, *, n: int, heads: int) -> HeadBias:
    """One of the rules, with biases up to some units of a score."""
    size = draw.between(0.1, 4.0)
    return (
        HeadBias(explicit=size * draw.normal(heads, n, n)),
        HeadBias(slopes=size * draw.normal(heads).abs(), symmetric=draw.integer(0, 1) == 1),
        HeadBias(table=size * draw.normal(heads, 2 * draw.integer(1, 5) + 1)),
    )[draw.integer(0, 2)]


def modern(layer: Attention, draw: Draw, n: int) -> Attention:
    """The layer with some of the newer parts; the keys are widened where they are too narrow to turn."""
    changes: dict[str, Any] = {}
    if draw.integer(0, 4):
        if layer.key_width == 1:
            layer = _widened(layer, draw)
        changes["rotary"] = random_rotary(draw, n=n, k=layer.key_width)
    if draw.integer(0, 1):
        changes["head_bias"] = random_head_bias(draw, n=n, heads=layer.heads)
    if draw.integer(0, 2) == 0 and layer.mask is None:
        changes["window_left"] = draw.integer(0, 3)
        changes["window_right"] = draw.integer(0, 3) if draw.integer(0, 1) else None
    if draw.integer(0, 2) == 0 and layer.heads % 2 == 0:
        changes |= _grouped(layer)
    return replace(layer, **changes)


def _widened(layer: Attention, draw: Draw) -> Attention:
    wider: dict[str, Any] = {}
    for name in ("w_q", "w_k", "b_q", "b_k"):
        value: Tensor | None = getattr(layer, name)
        if value is not None:
            wider[name] = torch.cat([value, value.abs().mean() * draw.normal(*value.shape[:-1], 3)], dim=-1)
    return replace(layer, **wider)


def _grouped(layer: Attention) -> dict[str, Any]:
    """Two heads share one head of keys and values."""
    parts = {name: getattr(layer, name) for name in ("w_k", "w_v", "b_k", "b_v")}
    shared = {name: value[::2].repeat_interleave(2, dim=0) for name, value in parts.items() if value is not None}
    return {**shared, "kv_heads": layer.heads // 2}


def modern_problem(problem: Problem, draw: Draw) -> Problem:
    """The same question about a modern layer; a margin's clean values stay what they were."""
    layer = problem.network
    assert isinstance(layer, Attention)
    changed = modern(layer, draw, problem.clean.n)
    goal = problem.goal
    if isinstance(goal, Margin):
        weights = pool_weights(goal.pool, problem.clean.mass)
        assert weights is not None
        assert isinstance(goal.bias, Tensor)
        points, mass = problem.clean.points, problem.mass
        shift = goal.weight @ (weights @ (layer(points, mass) - changed(points, mass)))
        goal = Margin(weight=goal.weight, bias=goal.bias + shift, pool=goal.pool, label=goal.label)
    return Problem(changed, problem.clean, problem.threat, goal)
