"""Children near their parents (p = inf): every row with the scores and values it has at the clean input (derived)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.measures.questions import OUTWARD_MASS, refuse_ball, refuse_order
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadNorms, bilinear_norm, diameter, readouts, spectral_norm
from attnrobust.certify.shared.reach import attention_of, visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall, WassersteinBall

SATURATED = 300.0
"""Half-ranges of scores beyond which any weight is taken as possible; e^300 and its inverse are far inside float64."""
ROUNDING = 1e-15
"""Of a weighted average of values, relative to the largest of them and per token summed (worst case)."""
NUMBERS_AT_ONCE = 2**23


@dataclass(frozen=True, eq=False)
class Rows:
    """The clean input's rows that the goal reads, and how far scores may go when atoms move by at most 1.

    Args:
        weights: Attention weights P (h, r, n).
        visible: Which tokens a row sees, also where their weights underflow.
        query: ``|alpha_j - E_i alpha|`` times whether row i moves: slope of scores in the row's own move (h, r, n).
        key: ``|beta_i|`` times whether token j moves (h, r, n).
        both: ``||B||`` where both move (h, r, n).
        pool: Weights of the rows in a pooled goal, or None (r,).
        mass: Masses of the rows (r,).
        moves: Whether a visible token moves: 1 or 0.
    """

    weights: Float[Tensor, "h r n"]
    visible: Bool[Tensor, "h r n"]
    query: Float[Tensor, "h r n"]
    key: Float[Tensor, "h r n"]
    both: Float[Tensor, "h r n"]
    pool: Float[Tensor, "r"] | None
    mass: Float[Tensor, "r"]
    moves: float

    @classmethod
    def of(cls, problem: Problem, layer: Attention) -> "Rows":
        """Evaluate the clean input."""
        points, n = problem.clean.points, problem.clean.n
        pool = problem.resolved.weights
        rows = torch.arange(n, device=points.device) if pool is None else pool.nonzero().flatten()
        moves = problem.threat.movable(n).to(points)
        scores = layer.scores(points, problem.mass)[:, rows]
        weights = torch.softmax(scores, dim=-1)
        alpha = layer.factor * torch.einsum("nd,hdk->hnk", points, layer.w_k) @ layer.w_q.transpose(-1, -2)
        beta = layer.factor * layer.queries(points)[:, rows] @ layer.w_k.transpose(-1, -2)
        away = torch.cdist(weights @ alpha, alpha, compute_mode="donot_use_mm_for_euclid_dist")
        slope = torch.linalg.vector_norm(beta, dim=-1)
        norm = bilinear_norm(layer)
        own, others = moves[rows][:, None], moves[None, :]
        seen = visible_tokens(layer, n).to(points)
        return cls(
            weights=weights,
            visible=~torch.isneginf(scores),
            query=away * own,
            key=slope[..., None] * others,
            both=norm[:, None, None] * (own * others),
            pool=None if pool is None else pool[rows],
            mass=problem.clean.mass[rows],
            moves=float((moves * seen).amax()),
        )

    def half_range(self, size: float) -> Float[Tensor, "h r n"]:
        """Scores of row i to token j change by at most this, up to a number that is the same for all j."""
        return size * (self.query + self.key + size * self.both) * self.visible

    @property
    def rounding(self) -> float:
        """Of averages over the tokens, relative to the largest value."""
        return ROUNDING * (10 + self.weights.shape[-1])


class MeasureCluster(CertificateMethod):
    """Every atom within eps of its parent (or W_inf): masses of the clusters stay, scores stay in known ranges.

    Row by row, ``Gamma_nu(x') - Gamma_mu(x_i)`` is at most ``||M|| eps`` for the moved values plus what weights can do
    to the clean values whose scores change by at most ``eta_ij = eps (|alpha_j - E_i alpha| + |beta_i| + ||B|| eps)``:
    for a margin the exact maximum (by a threshold), for a displacement the smaller of ``D tanh(eta / 2)`` and
    ``sum_j |dP_ij| |y_j - o_i|``.
    No exponential, no n, and where a row is saturated nothing happens until scores can cross.
    """

    name = "measure-cluster"
    reference = "derived (docs/measure-certificates.md, section 5)"
    region = "every measure whose atoms are within the radius of their parents, masses kept"

    layers = (Attention,)
    features = ATTENTION_FEATURES
    threats = (CouplingBall, WassersteinBall)
    outward = OUTWARD_MASS

    def refuses_more(self, problem: Problem) -> str | None:
        return refuse_ball(problem) or refuse_order(problem, float("inf"))

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        layer = attention_of(problem)
        rows = Rows.of(problem, layer)
        values = torch.einsum("nd,hdv->hnv", problem.clean.points, layer.w_v)
        if problem.resolved.functionals is not None:
            after = next(iter(readouts(layer, problem.resolved)))[0]  # (c, h, v, 1)
            # A margin drops by -functional . change.
            drops = _Drops(rows, -(values @ after)[..., 0], spectral_norm(layer.w_v @ after))
            return ChangeBound(problem, drops.change)
        visible = visible_tokens(layer, problem.clean.n)
        views = [
            _View(HeadNorms(spectral_norm(layer.w_v @ after), stack), (values @ after)[0], visible)
            for after, stack in readouts(layer, problem.resolved)
        ]
        scale = problem.clean.n**0.5

        def change(size: float) -> Tensor:
            return smallest([_displaced(rows, view, size, scale) for view in views])

        return ChangeBound(problem, change)


@dataclass(frozen=True, eq=False)
class _Drops:
    """Margins: values along each functional."""

    rows: Rows
    values: Float[Tensor, "c h n"]
    norms: Float[Tensor, "c h"]

    def change(self, size: float) -> Float[Tensor, "c"]:
        rows, half = self.rows, self.rows.half_range(size)
        assert rows.pool is not None  # noqa: S101 - a margin pools its rows; narrows the type
        together = max(1, NUMBERS_AT_ONCE // half.numel())
        shares = [highest_average(rows.weights, rows.visible, half, part) for part in self.values.split(together)]
        rounding = rows.rounding * self.values.abs().amax(dim=-1)
        per_head = torch.cat(shares) @ rows.pool + rounding + self.norms * (size * rows.moves)
        return per_head.sum(dim=-1)


@dataclass(frozen=True, eq=False)
class _View:
    """Displacements: values of each head under one sound view."""

    norms: HeadNorms
    values: Float[Tensor, "h n r"]
    visible: Tensor


def _displaced(rows: Rows, view: _View, size: float, scale: float) -> Float[Tensor, "c"]:
    half = rows.half_range(size)
    widest = half.amax(dim=-1)  # (h, r)
    spread = diameter(view.values[:, view.visible])[:, None]
    varied = spread * torch.tanh(0.5 * widest)
    averages = rows.weights @ view.values
    away = torch.cdist(averages, view.values, compute_mode="donot_use_mm_for_euclid_dist")
    single = (largest_weight_change(rows.weights, half + widest[..., None]) * away).sum(dim=-1)
    varied = torch.where(widest < SATURATED, torch.minimum(varied, single), spread)
    rounding = rows.rounding * torch.linalg.vector_norm(view.values, dim=-1).amax(dim=-1)
    each = varied + rounding[:, None] + (size * rows.moves) * view.norms.norms[0][:, None]  # (h, r)
    if rows.pool is not None:
        return view.norms.total((each @ rows.pool)[None])
    return scale * (view.norms.total(each.T).square() @ rows.mass).sqrt()[None]


def highest_average(
    weights: Float[Tensor, "h r n"],
    visible: Bool[Tensor, "h r n"],
    half: Float[Tensor, "h r n"],
    values: Float[Tensor, "c h n"],
) -> Float[Tensor, "c h r"]:
    """Exact ``max sum_j P'_j y_j - sum_j P_j y_j`` over weights whose logarithms change by at most ``half_j``.

    A ratio of linear functions of the ``e^{Delta_j}`` is largest where tokens above a threshold gain all they can and
    the others lose all they can; every threshold is tried.
    """
    averages = torch.einsum("hrn,chn->chr", weights, values)
    centred = values[:, :, None, :] - averages[..., None]
    order = centred.argsort(dim=-1, descending=True)
    sorted_values = centred.gather(-1, order)
    sorted_weights = weights.expand_as(centred).gather(-1, order)
    sorted_half = half.clamp_max(SATURATED).expand_as(centred).gather(-1, order)
    gaining, losing = sorted_weights * sorted_half.exp(), sorted_weights * (-sorted_half).exp()
    reached = (gaining * sorted_values).cumsum(dim=-1) + _sum_after(losing * sorted_values)
    best = (reached / (gaining.cumsum(dim=-1) + _sum_after(losing))).amax(dim=-1)
    highest = centred.masked_fill(~visible, -torch.inf).amax(dim=-1)
    averaged: Tensor = torch.where((half > SATURATED).any(dim=-1), highest, torch.minimum(best, highest))
    return averaged.clamp_min(0.0)


def largest_weight_change(weights: Float[Tensor, "*b n"], ratio: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """``|P'_j - P_j|`` where the odds of token j change by a factor within ``e^{+-ratio_j}``."""
    top = weights.argmax(dim=-1, keepdim=True)
    rest = (1.0 - weights).scatter(-1, top, weights.scatter(-1, top, 0.0).sum(dim=-1, keepdim=True))
    shrunk = (-ratio).exp()
    least = torch.minimum(weights + rest * shrunk, weights * shrunk + rest)
    change: Tensor = weights * rest * -(-ratio).expm1() / least.clamp_min(1e-300)
    return change


def _sum_after(terms: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """Sum of what comes behind each entry."""
    behind = terms.flip(-1).cumsum(dim=-1).flip(-1)
    return torch.cat([behind[..., 1:], torch.zeros_like(behind[..., :1])], dim=-1)
