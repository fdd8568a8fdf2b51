"""Random displacement problems: every threat and goal; masks, masses, biases, saturated rows, equal tokens, n = 1."""

import math

import torch
from torch import Tensor

from attnrobust.goals import Displacement, Pool
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall, TokenNorm
from attnrobust.tokens import TokenMeasure
from tests.stress import Draw

THREATS = (
    "all tokens", "some tokens", "known token", "any token", "per token l2", "per token linf", "per token l1",
)  # fmt: skip
SIZES = (1.0, 1.0, 1.0, 1e3, 1e-3)  # factors of the tokens


def random_threat(draw: Draw, kind: str, n: int) -> MoveThreat:
    """A threat of the kind; one half of those where each token has its own budget take some tokens only."""
    some = tuple(draw.integer(0, n - 1) for _ in range(draw.integer(1, n)))
    tokens = some if draw.integer(0, 1) else None
    norms: dict[str, TokenNorm] = {"per token l2": "l2", "per token linf": "linf", "per token l1": "l1"}
    if kind in norms:
        return PerTokenBall(norms[kind], tokens)
    if kind == "any token":
        return AnyToken(tokens)
    return FrobeniusBall({"all tokens": None, "some tokens": some, "known token": some[:1]}[kind])


def random_mask(draw: Draw, n: int) -> Tensor | None:
    """None, finite numbers, hidden pairs, or a key that no other query sees."""
    kind = draw.integer(0, 5)
    if kind > 2:
        return None
    mask = 2.0 * draw.normal(n, n)
    if kind == 1:
        mask[draw.normal(n, n) < -0.5] = -math.inf
    if kind == 2:
        mask = torch.zeros_like(mask)
        mask[:, -1] = -math.inf
    return mask.fill_diagonal_(0.0)


def random_layer(draw: Draw, *, n: int, d: int) -> Attention:
    h, k, v, e = draw.integer(1, 4), draw.integer(1, 4), draw.integer(1, 4), draw.integer(1, 6)
    logits = (30.0 if draw.integer(0, 6) == 0 else 10 ** draw.between(-1.2, 1.2)) / d
    values = 10 ** draw.between(-0.7, 0.8) / d**0.5
    biased, projected = draw.integer(0, 1) == 1, draw.integer(0, 1) == 1

    def bias(*shape: int) -> Tensor | None:
        return draw.between(0, 3) * draw.normal(*shape) if biased else None

    return Attention(
        w_q=logits * draw.normal(h, d, k),
        w_k=draw.normal(h, d, k),
        w_v=values * draw.normal(h, d, v),
        b_q=bias(h, k),
        b_k=bias(h, k),
        b_v=bias(h, v),
        w_o=draw.normal(h, v, e) if projected else None,
        b_o=bias(e if projected else h * v),
        scale=draw.between(-1.0, 2.0) if draw.integer(0, 3) == 0 else None,
        mask=random_mask(draw, n),
        causal=draw.integer(0, 4) == 0,
    )


def random_points(draw: Draw, *, n: int, d: int) -> Tensor:
    """Gaussian tokens of some size, sometimes equal or nearly equal."""
    x = 10 ** draw.between(-0.6, 0.6) * draw.normal(n, d)
    kind = draw.integer(0, 9)
    if kind < 2:
        x = x[:1].expand(n, d) + (1e-3 * draw.normal(n, d) if kind else 0.0)
    return SIZES[draw.integer(0, len(SIZES) - 1)] * x


def random_problem(seed: int, kind: str) -> Problem:
    """One small displacement problem per seed; every property is drawn by itself."""
    draw = Draw(seed)
    n, d = draw.integer(1, 6), draw.integer(1, 7)
    layer, x = random_layer(draw, n=n, d=d), random_points(draw, n=n, d=d)
    mass = torch.softmax(2.0 * draw.normal(n), dim=0) if draw.integer(0, 2) == 0 else None
    clean = TokenMeasure(x) if mass is None else TokenMeasure(x, mass)
    pools: tuple[Pool, ...] = ("all", "all", "mean", draw.integer(0, n - 1))
    tolerance = 10 ** draw.between(-4.0, 0.3) * float(x.norm()) * float(layer.w_v.norm())
    goal = Displacement(tolerance, pool=pools[draw.integer(0, 3)])
    return Problem(layer, clean, random_threat(draw, kind, n), goal)
