"""A complete certificate in ball arithmetic: value path exact, softmax by its Lipschitz constant 1/2."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnrobust.certify.method import PLACED_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.shared.reach import attention_of
from attnrobust.goals import Displacement, Margin, pool_weights
from attnrobust.layers.attention import Attention
from attnrobust.numerics import balls as rigorous
from attnrobust.numerics.balls import Ball, BallMatrix
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import MoveThreat, PerTokenBall

SECONDS_LIMIT = 20.0
SECONDS_PER_STEP = 2e-8  # of one multiply-add of ball matrices at 128 bits, measured at 16 to 384 columns


class RigorousLocal(CertificateMethod):
    """Finite-radius bound around the clean input with every rounding error inside.

    One head, rho = ||X' - X||_F, keys and values centred by any constant row, the score factor inside,
    ``A = w_q w_k^T``, ``V = w_v w_o`` and ``Y = X V``:
    ``||df|| <= rho ||P|| ||V|| + (rho ||Q w_k^T|| + rho ||w_q K_c^T|| + rho^2 ||A||)/2 (||Y_c|| + rho ||V||)``.
    Pooled rows and class margins have their own form.
    """

    name: ClassVar[str] = "rigorous-local"
    reference: ClassVar[str] = "derived, docs/norm-bounds.md, 'A certificate in ball arithmetic'"
    region: ClassVar[str] = "every move of the threat up to the radius, the layer taken in exact arithmetic"
    kind: ClassVar[Kind] = Kind.RIGOROUS
    layers = (Attention,)
    features = PLACED_FEATURES

    def refuses_more(self, problem: Problem) -> str | None:
        seconds = estimated_seconds(attention_of(problem), problem.clean.n)
        if seconds > SECONDS_LIMIT:
            return f"ball arithmetic would take about {seconds:.0f} s at this size; the limit is {SECONDS_LIMIT:.0f} s"
        return None if rigorous.available() else rigorous.CURE

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        with rigorous.precision():
            return _prepare(problem)


def estimated_seconds(layer: Attention, n: int) -> float:
    """Rough time of the ball products of one problem."""
    squared = rigorous.SQUARINGS * (n**3 + 4 * min(n, layer.key_width) ** 3 + layer.value_width**3)
    once = (n + layer.width + layer.out_width) * layer.width * 4 * (layer.key_width + layer.value_width)
    return SECONDS_PER_STEP * layer.heads * (squared + once / 4)


@dataclass(frozen=True, eq=False)
class _Head:
    """What the bound needs of one head and one functional (or of the whole output)."""

    value: Ball  # the pooled weights' norm times ||V||
    scores: Ball  # change of the (weighted) scores per rho ...
    scores_square: Ball  # ... and per rho^2
    saturation: Ball  # the weighted change of the attention weights is at most this
    spread: Ball  # ||Y_c||
    growth: Ball  # ||V||

    def change(self, rho: Ball) -> Ball:
        moved = (rho * self.scores + rho * rho * self.scores_square) / 2
        return rho * self.value + rigorous.smallest([moved, self.saturation]) * (self.spread + rho * self.growth)


@dataclass(frozen=True, eq=False)
class _Bound(PreparedBound):
    heads: tuple[tuple[_Head, ...], ...]  # per functional, per head
    budgets: tuple[Ball, ...]
    squared_factor: int  # (sup ||D||_F / distance(D))^2
    orthogonal: bool  # the heads write to orthogonal parts of the counted output

    def usage(self, radius: float) -> Upper:
        with rigorous.precision():
            rho = rigorous.ball(radius) * rigorous.root(rigorous.ball(float(self.squared_factor)))
            shares = [self._change(heads, rho) / budget for heads, budget in zip(self.heads, self.budgets, strict=True)]
            if not all(budget > 0 for budget in self.budgets):
                return Upper(float("inf"))
            return Upper(rigorous.upper_float(rigorous.largest(shares)))

    def _change(self, heads: tuple[_Head, ...], rho: Ball) -> Ball:
        total = rigorous.ball(0.0)
        for head in heads:
            change = head.change(rho)
            total += change * change if self.orthogonal else change
        return rigorous.root(total) if self.orthogonal else total


def _prepare(problem: Problem) -> _Bound:
    layer = problem.network
    assert isinstance(layer, Attention)  # noqa: S101 - refused otherwise; narrows the type
    clean = _clean(layer, problem)
    pool = pool_weights(problem.goal.pool, problem.clean.mass)  # type: ignore[attr-defined]
    functionals, budgets = _goal(problem, clean, pool)
    heads = tuple(
        tuple(_head(layer, h, problem, clean, functional, pool) for h in range(layer.heads))
        for functional in functionals
    )
    orthogonal = layer.w_o is None and functionals[0] is None
    return _Bound(heads, budgets, _squared_factor(problem.moves, problem.clean.n, layer.width), orthogonal)


# ---- the clean input -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Maps:
    """The weights of one head as balls."""

    query: BallMatrix
    key: BallMatrix
    value: BallMatrix
    out: BallMatrix

    @classmethod
    def of(cls, layer: Attention, h: int) -> "_Maps":
        parts = (layer.w_q[h], layer.w_k[h], layer.w_v[h], _head_output(layer, h))
        return cls(*map(rigorous.ball_matrix, parts))


@dataclass(frozen=True, eq=False)
class _Clean:
    weights: tuple[BallMatrix, ...]  # per head, (n, n)
    queries: tuple[BallMatrix, ...]  # per head, (n, k), times the score factor
    maps: tuple["_Maps", ...]
    output: BallMatrix  # (n, e)


def _clean(layer: Attention, problem: Problem) -> _Clean:
    x, visible = rigorous.ball_matrix(problem.clean.points), visible_keys(layer, problem.clean.n)
    weights, scaled, output = [], [], None
    maps = tuple(_Maps.of(layer, h) for h in range(layer.heads))
    for h, head in enumerate(maps):
        queries = _affine(x, head.query, None if layer.b_q is None else layer.b_q[h]) * rigorous.ball(layer.factor)
        keys = _affine(x, head.key, None if layer.b_k is None else layer.b_k[h])
        scores = queries * keys.transpose()
        scaled.append(queries)
        weights.append(rigorous.softmax_rows(_with_bias(scores, layer, h, problem, visible), visible))
        values = _affine(x, head.value, None if layer.b_v is None else layer.b_v[h])
        part = weights[h] * values * head.out
        output = part if output is None else output + part
    if layer.b_o is not None:
        output = output + rigorous.ball_matrix(layer.b_o.expand(problem.clean.n, -1))
    return _Clean(tuple(weights), tuple(scaled), maps, output)


def _affine(x: BallMatrix, weight: BallMatrix, bias: Tensor | None) -> BallMatrix:
    out = x * weight
    return out if bias is None else out + rigorous.ball_matrix(bias.expand(x.nrows(), -1))


def _with_bias(scores: BallMatrix, layer: Attention, h: int, problem: Problem, visible: Tensor) -> BallMatrix:
    """Scores of one head with mask, head bias and log-mass; hidden entries get any finite number."""
    if layer.mask is not None:
        scores = scores + rigorous.ball_matrix(layer.mask.masked_fill(~visible, 0.0))
    if layer.head_bias is not None:
        scores = scores + rigorous.ball_matrix(layer.head_bias.matrix(problem.clean.n)[h])
    if problem.mass is None:
        return scores
    logs = [rigorous.ball(m).log() for m in problem.mass.tolist()]
    return scores + rigorous.from_rows([logs] * problem.clean.n)


def visible_keys(layer: Attention, n: int) -> Tensor:
    """Which key every query sees, (n, n)."""
    bias = layer.score_bias(n)
    if bias is None:
        return torch.ones(n, n, dtype=torch.bool)
    return ~torch.isneginf(bias if bias.ndim == 2 else bias[0]).cpu()  # biases of heads are finite


def _head_output(layer: Attention, h: int) -> Tensor:
    """Value space to output of one head, (v, e)."""
    if layer.w_o is not None:
        return layer.w_o[h]
    v = layer.value_width
    out = layer.w_v.new_zeros(v, layer.out_width)
    out[:, h * v : (h + 1) * v] = torch.eye(v, dtype=out.dtype)
    return out


# ---- the goal ------------------------------------------------------------------------------------------------------


def _goal(
    problem: Problem, clean: _Clean, pool: Tensor | None
) -> tuple[tuple[BallMatrix | None, ...], tuple[Ball, ...]]:
    """Functionals (e, 1), None for the norm of the whole output, and the budget of each, as balls."""
    goal = problem.goal
    pooled = clean.output if pool is None else rigorous.ball_matrix(pool[None, :]) * clean.output
    if isinstance(goal, Displacement):
        tolerance = rigorous.ball(goal.tolerance)
        return (None,), (tolerance * rigorous.frobenius(pooled) if goal.relative else tolerance,)
    assert isinstance(goal, Margin)  # noqa: S101 - refused otherwise; narrows the type
    label, weight = problem.resolved.label, rigorous.ball_matrix(goal.weight)
    logits = (pooled * weight.transpose()).entries()
    if goal.bias is not None:
        logits = [logit + rigorous.ball(b) for logit, b in zip(logits, goal.bias.tolist(), strict=True)]
    rows = weight.tolist()
    functionals = tuple(
        rigorous.from_rows([[a - b] for a, b in zip(rows[label], rows[c], strict=True)])
        for c in problem.resolved.classes
    )
    return functionals, tuple(logits[label] - logits[c] for c in problem.resolved.classes)


def _squared_factor(threat: MoveThreat, n: int, d: int) -> int:
    if not isinstance(threat, PerTokenBall):
        return 1
    return int(threat.movable(n).sum()) * (d if threat.norm == "linf" else 1)


# ---- one head ------------------------------------------------------------------------------------------------------


def _head(
    layer: Attention, h: int, problem: Problem, clean: _Clean, functional: BallMatrix | None, pool: Tensor | None
) -> _Head:
    """Left out: rows that the pooling ignores, keys that no counted row sees, scores of rows that see one key."""
    n = problem.clean.n
    visible = visible_keys(layer, n)
    counted = torch.ones(n, dtype=torch.bool) if pool is None else pool.cpu() > 0
    seen = visible[counted].any(dim=0)
    choosing = counted & (visible.sum(dim=1) > 1)  # a row with one visible key has the weight 1 whatever its score
    x = rigorous.ball_matrix(problem.clean.points)
    weights, queries, maps = clean.weights[h], clean.queries[h], clean.maps[h]
    w_q, w_k, w_v = maps.query * rigorous.ball(layer.factor), maps.key, maps.value
    out = (maps.out if functional is None else maps.out * functional).transpose()
    centred = _centred(_rows(x, seen))
    bilinear, key_norm = rigorous.spectral_of_product(w_q, w_k), rigorous.spectral_of_product(centred * w_k, w_q)
    growth, spread = rigorous.spectral_of_product(w_v, out), rigorous.spectral_of_product(centred * w_v, out)
    rows = torch.ones(n, dtype=torch.float64) if pool is None else pool.cpu()
    value = (rigorous.spectral(weights) if pool is None else _length(rows, weights)) * growth
    if not bool(choosing.any()):
        nothing = rigorous.ball(0.0)
        return _Head(value, nothing, nothing, nothing, spread, growth)
    query_norm = rigorous.spectral_of_product(_rows(queries, choosing), w_k)
    if pool is None:
        saturation = rigorous.root(rigorous.ball(2.0 * float(choosing.sum())))
        return _Head(value, query_norm + key_norm, bilinear, saturation, spread, growth)
    length = _length(rows * choosing)
    total, mean = rigorous.ball(0.0), rigorous.ball(0.0)
    for weight, row in zip((rows * choosing).tolist(), (queries * w_k.transpose()).tolist(), strict=True):
        total += rigorous.ball(weight)
        mean += rigorous.ball(weight) * rigorous.frobenius(rigorous.from_rows([row]))
    scores = length * key_norm + rigorous.smallest([length * query_norm, mean])
    saturation = total * rigorous.root(rigorous.ball(2.0))
    return _Head(value, scores, length * bilinear, saturation, spread, growth)


def _length(row: Tensor, matrix: BallMatrix | None = None) -> Ball:
    """Euclidean norm of a row of floats, or of its product with a matrix."""
    balls = rigorous.ball_matrix(row[None, :])
    return rigorous.frobenius(balls if matrix is None else balls * matrix)


def _rows(matrix: BallMatrix, chosen: Tensor) -> BallMatrix:
    return rigorous.from_rows([row for row, keep in zip(matrix.tolist(), chosen.tolist(), strict=True) if keep])


def _centred(matrix: BallMatrix) -> BallMatrix:
    """Rows minus their mean (rounded to an exact row: any constant row may be taken away)."""
    rows = matrix.tolist()
    means = [sum(column, start=rigorous.ball(0.0)) / len(rows) for column in zip(*rows, strict=True)]
    return rigorous.from_rows([[entry - mean.mid() for entry, mean in zip(row, means, strict=True)] for row in rows])
