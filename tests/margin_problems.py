"""Random margin problems that are hard for a majorant: saturated, masked, weighted, biased, equal tokens, one token."""

import math

import torch
from torch import Tensor

from attnrobust.certify.margin.one_token.descent import SHARES, SIGNED
from attnrobust.certify.margin.trust_region import Quadratic
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.goals import Margin, Pool, pool_weights
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat
from attnrobust.tokens import TokenMeasure
from tests.stress import Draw


def random_layer(draw: Draw, *, seed: int, n: int, d: int) -> Attention:
    h, k, e = draw.integer(1, 4), draw.integer(1, 5), draw.integer(1, 5)
    logits = 10 ** draw.between(-0.5, 0.6) * (8.0 if seed % 7 == 0 else 1.0) / d**0.5
    values = 10 ** draw.between(-0.5, 0.5) / d**0.5
    options: dict[str, Tensor | bool] = {}
    if draw.integer(0, 1):
        for name in ("b_q", "b_k", "b_v"):
            options[name] = draw.between(0, 3) * draw.normal(h, k)
        options["b_o"] = draw.normal(e)
    if seed % 3 == 1 and n > 1:
        mask = 2.0 * draw.normal(n, n)
        mask[torch.rand(n, n, generator=draw.generator) < 0.3] = -math.inf
        options["mask"] = mask.fill_diagonal_(0.0)
    if seed % 5 == 2:
        options["causal"] = True
    return Attention(
        w_q=logits * draw.normal(h, d, k), w_k=logits * draw.normal(h, d, k), w_v=values * draw.normal(h, d, k),
        w_o=draw.normal(h, k, e), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def random_problem(seed: int, threat: MoveThreat | None = None) -> Problem:
    """One small margin problem per seed whose clean prediction is class 0."""
    draw = Draw(seed)
    n = draw.integer(1, 6) if threat is None else draw.integer(4, 6)
    d = draw.integer(2, 10)
    layer = random_layer(draw, seed=seed, n=n, d=d)
    x = 10 ** draw.between(-0.3, 0.3) * draw.normal(n, d)
    if seed % 11 == 3:
        x = x[:1].expand(n, d).clone()
    mass = None
    if seed % 4 == 1:
        mass = torch.rand(n, generator=draw.generator, dtype=torch.float64) + 0.05
        mass = mass / mass.sum()
    pool: Pool = "mean" if draw.integer(0, 1) else draw.integer(0, n - 1)
    clean = TokenMeasure(x, mass) if mass is not None else TokenMeasure(x)
    weights = pool_weights(pool, clean.mass)
    assert weights is not None
    pooled = weights @ layer(x, mass)
    readout = draw.normal(3 if seed % 6 == 0 else 2, layer.out_width)
    bias = -(readout @ pooled)
    bias[0] += draw.between(0.05, 2.0) * (0.1 + float(readout.std() * pooled.norm()))
    return Problem(layer, clean, threat or FrobeniusBall(), Margin(weight=readout, bias=bias, pool=pool, label=0))


def frobenius(problem: Problem, radius: float) -> MoveBudget:
    n, d = problem.clean.points.shape
    threat = problem.moves
    return MoveBudget(radius * threat.frobenius_factor(n, d), radius * threat.token_factor(n, d), radius)


def evaluation_rounding(problem: Problem) -> float:
    """How far the rounding of one evaluation may move a margin."""
    goal = problem.goal
    assert isinstance(goal, Margin)
    return 1e-14 * float(goal.weight.norm() * problem.clean_output.norm())


def radius_of(problem: Problem, share: float) -> float:
    return share * float(problem.clean.points.norm()) / problem.clean.n**0.5


def random_quadratic(seed: int, size: int) -> tuple[Tensor, Quadratic]:
    draw = Draw(seed)
    matrix = draw.normal(size, size)
    matrix = 0.5 * (matrix + matrix.T)
    gradient = draw.normal(size)
    if seed % 2:  # hard case: no gradient along the leading eigenvector
        top = torch.linalg.eigh(matrix)[1][:, -1]
        gradient = 0.1 * (gradient - (gradient @ top) * top)
    return matrix, Quadratic(lambda v: v @ matrix, gradient)


def any_token(seed: int) -> Problem:
    problem = random_problem(seed)
    return Problem(problem.network, problem.clean, AnyToken(), problem.goal)


def perturbed(draw: Draw, name: str, value: Tensor) -> Tensor:
    """Another legal value of a parameter: references and curves of any sign, positive ones over two decades."""
    if name in SIGNED:
        return value + 10 ** draw.between(-2.0, 0.5) * draw.normal(*value.shape)
    if name in SHARES:
        return (value + 0.4 * draw.normal(*value.shape)).clamp(0.0, 1.0)
    return value * 10 ** (0.5 * draw.normal(*value.shape))
