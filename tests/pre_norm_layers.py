"""Random questions about hidden states before the norm of a block."""

from dataclasses import replace

import torch
from torch import Tensor

from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.problem import Problem
from attnrobust.threats.moves import MoveThreat
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import random_layer
from tests.modern_layers import modern
from tests.stress import Draw


def random_norm(draw: Draw, d: int) -> LayerNorm | RMSNorm:
    """Both kinds, with and without bias; an eps in three is of the size of the tokens."""
    kind = (LayerNorm, RMSNorm)[draw.integer(0, 1)]
    eps = 10 ** draw.between(-2.0, 1.0) if draw.integer(0, 2) == 0 else 1e-6
    return kind(weight=1.0 + 0.4 * draw.normal(d), bias=draw.normal(d) if draw.integer(0, 1) else None, eps=eps)


def pre_norm_layer(draw: Draw, *, seed: int, n: int, d: int) -> PreNormAttention:
    """A modern layer behind a norm; every other one adds its tokens."""
    layer = modern(random_layer(draw, seed=seed, n=n, d=d), draw, n)
    layer = replace(layer, w_o=draw.normal(layer.heads, layer.value_width, d) / d**0.5, b_o=None)
    return PreNormAttention(random_norm(draw, d), layer, residual=seed % 2 == 0)


def pre_norm_problem(seed: int, threat: MoveThreat, *, margin: bool, small: bool = False) -> Problem:
    """One question; tokens differ in length by up to a factor of 30, as hidden states do."""
    draw = Draw(seed)
    n, d = draw.integer(3, 4 if small else 6), draw.integer(3, 5 if small else 9)
    layer = pre_norm_layer(draw, seed=seed, n=n, d=d)
    points = draw.normal(n, d) * torch.tensor([10 ** draw.between(-0.5, 1.0) for _ in range(n)])[:, None]
    clean = TokenMeasure(points)
    goal: Goal = Displacement(
        10 ** draw.between(-2.0, 0.0), relative=True, pool=(n - 1, "all", "mean")[draw.integer(0, 2)]
    )
    return Problem(layer, clean, threat, _margin(layer, points, draw) if margin else goal)


def _margin(layer: PreNormAttention, points: Tensor, draw: Draw) -> Margin:
    row = draw.integer(0, points.shape[0] - 1)
    out, readout = layer(points)[row], draw.normal(2, layer.out_width)
    bias = -(readout @ out)
    bias[0] += draw.between(0.05, 1.0) * (0.1 + float(out.norm()))
    return Margin(weight=readout, bias=bias, pool=row, label=0)
