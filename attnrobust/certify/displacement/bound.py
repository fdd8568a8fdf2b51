"""Displacement certificate: the bound at one problem, first order exact, one joint eigenvalue bound."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows, ValueRows
from attnrobust.certify.displacement.bilinear import QueryKeyForm, value_logit_form
from attnrobust.certify.displacement.joint_form import JointProduct
from attnrobust.certify.displacement.remainder import LogitForms, RemainderMajorant
from attnrobust.certify.method import PreparedBound
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.chance import MAIN_FAILURE, Chance, stream
from attnrobust.numerics.linear_map import EigenvalueBounds, LinearMap, largest_eigenvalue_upper
from attnrobust.numerics.rounding import FORMULA, SMALLEST, SMALLEST_UNIT, nonzero, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import PerTokenBall

EVENTS = 64  # eigenvalue bounds that a radius is likely to need
DENSE_LIMIT = 300  # n d up to which every eigenvalue is computed without randomness
POWER_STEPS = 8  # of the first guess
ROUNDS = 4  # rebalancing rounds of the joint bound
TOKEN_ROUNDS = 5  # the same where token scales adapt too
SETTLED = 2e-3  # relative distance to the least that any shares can give on the directions seen
REMEMBERED = 4  # directions that choose the shares
FLOOR = 1e-4  # smallest share
SMALLEST_PART = 1e-30  # of the largest part; parts and weights below count as this while shares are chosen
BALANCE_STEPS = 150  # of the shares' small concave problem; any shares are sound


@dataclass(eq=False)
class DisplacementBound(PreparedBound):
    """``||pooled(X0 + D) - pooled(X0)|| <= ||J D|| + mixing sum_k |L_k D|`` on the ball (eq. 4).

    Args:
        problem: The question.
        seed: Seed of random start vectors.
        clean: Clean rows of the same layer and input, whose work is shared; None computes them.
        chance: Failure probability to share with the bounds of other tokens; None means one of its own.
    """

    problem: Problem
    seed: int
    clean: ValueRows | None = None
    chance: Chance | None = None

    def __post_init__(self) -> None:
        layer, clean = self.problem.network, self.problem.clean
        assert isinstance(layer, Attention)  # noqa: S101 - `refuses` was asked first; narrows the type
        movable = self.problem.moves.movable(clean.n)
        weights = self.problem.resolved.weights
        shared = self.clean or ValueRows(layer, clean.points, self.problem.mass)
        if shared.layer is not layer or shared.points is not clean.points or shared.mass is not self.problem.mass:
            raise ValueError("the clean rows belong to another layer or input")
        self._rows = MovingRows(shared, weights, movable)
        jacobian = AttentionJacobian(layer, clean.points, self.problem.mass)
        self._jacobian: LinearMap = jacobian.linear_map(pool=weights, token_scale=self._rows.moves)
        self._majorant = RemainderMajorant(self._rows)
        self._chance = self.chance or Chance(self.seed, "displacement", MAIN_FAILURE, EVENTS)
        self._clean_pair = value_logit_form(self._rows, seed=stream(self.seed, "value-logit"))
        self._product = JointProduct(self._rows, self._majorant, self._clean_pair, QueryKeyForm(self._rows))
        factor = self.problem.moves.frobenius_factor(clean.n, clean.width)
        self._scale = factor
        # Token scales t with sum over movable tokens of 1/t_j^2 = their number; they only adapt for per-token balls.
        self.token_scales = torch.ones_like(clean.points[:, :1])
        self._first, self._seen = self._first_order()

    @property
    def rows(self) -> MovingRows:
        """The rows, and which tokens move."""
        return self._rows

    def _first_order(self) -> tuple[float, list[Float[Tensor, "n d"]]]:
        """A rough norm of J for the first guess (any value is sound) and the direction where it is reached."""
        generator = torch.Generator().manual_seed(stream(self.seed, "estimate"))
        vector = torch.randn(self._rows.clean.points.shape, generator=generator, dtype=torch.float64).to(
            self._rows.clean.points
        )
        norm = 0.0
        for _ in range(POWER_STEPS):
            vector = self._jacobian.rmatvec(self._jacobian.matvec(vector / max(norm, SMALLEST) if norm else vector))
            norm = float(torch.linalg.vector_norm(vector))
        return max(math.sqrt(norm), SMALLEST_UNIT), [vector / max(norm, SMALLEST)]

    @property
    def failure_probability(self) -> float:
        return self._chance.spent

    @property
    def first_guess(self) -> float | None:
        return 0.7 * self.budget / (self._first * self._scale)

    @cached_property
    def budget(self) -> float:
        """Allowed displacement."""
        return float(self.problem.resolved.budgets[0])

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share on the threat's set of this radius; infinite where constants overflow."""
        reach = radius * self._scale
        forms = self._majorant.forms(reach)
        if not forms.finite:
            return Upper(math.inf)
        self._product = self._product.with_values(self._clean_pair.grown(forms.paired))
        mixing = self._rows.clean.mixing
        scales = self._rows.clean.points.new_tensor([1.0, mixing * reach, mixing * reach, mixing * reach, mixing])
        value = self._joint(forms, scales, self.budget / reach) * reach
        return Upper(used_share(value, self.budget, share=FORMULA), self.failure_probability)

    def _joint(self, forms: LogitForms, scales: Float[Tensor, "5"], limit: float) -> float:
        """Upper bound of ``sup over |D| = 1 of sum_k scales_k X_k(D)^{1/2}``: Cauchy-Schwarz with shares (eq. 19).

        Stops early once the bound is seen to stay above ``limit`` whatever the shares.
        """
        best = math.inf
        per_token = isinstance(self.problem.threat, PerTokenBall)
        for number in range(TOKEN_ROUNDS if per_token else ROUNDS):
            parts = self._parts(forms, scales)
            if not bool(torch.isfinite(parts).all()):  # a product left float64: this radius is not covered
                return best
            shares, least = balanced_shares(parts)
            if number and (least > limit or best <= least * (1.0 + SETTLED)) and not per_token:
                break
            tokens, factors = self.token_scales, scales.square() / shares
            try:
                bounds = self._bounded(forms, factors)
            except InputError:  # a product left float64 in another direction
                return best
            self._chance.spend(bounds.upper.failure_probability)
            best = min(best, math.sqrt(max(bounds.upper.value, 0.0) * float(shares.sum())))
            vector = self._embedded(bounds.vector)
            self._seen = [vector, *self._seen[: REMEMBERED - 1]]
            if per_token:
                self.token_scales = self._rescaled(tokens, vector)
        return best

    def _parts(self, forms: LogitForms, scales: Float[Tensor, "5"]) -> Float[Tensor, "s 5"]:
        """``scales_k^2 X_k`` of the directions that were worst so far; they only choose the shares."""
        parts = []
        for vector in self._seen:
            move = self.token_scales * vector
            parts.append(self._product.apply(move, forms, scales.square())[1].clamp_min(0.0) * scales.square())
        return torch.stack(parts)

    def _bounded(self, forms: LogitForms, factors: Float[Tensor, "5"]) -> EigenvalueBounds:
        """The largest eigenvalue of the joint form with these factors."""
        tokens = self.token_scales

        def product(flat: Tensor) -> Tensor:
            image = self._product.apply(tokens * self._embedded(flat), forms, factors)[0]
            return (tokens * image)[self._rows.movable].reshape(-1)

        size = int(self._rows.movable.sum()) * self._rows.clean.points.shape[1]
        share, seed = self._chance.next_event()
        return largest_eigenvalue_upper(
            product, size, failure_probability=share, seed=seed, tol=2e-3,
            dense_limit=DENSE_LIMIT, device=self._rows.clean.points.device,
        )  # fmt: skip

    def _embedded(self, flat: Float[Tensor, "N"]) -> Float[Tensor, "n d"]:
        """A vector over the movable tokens as a move of all."""
        moves = torch.zeros_like(self._rows.clean.points)
        moves[self._rows.movable] = flat.reshape(-1, moves.shape[1])
        return moves

    def _rescaled(self, tokens: Float[Tensor, "n 1"], vector: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """Token scales that move the maximiser towards equal token moves, normalised (eq. 20)."""
        moves = self._rows.moves[:, None]
        count = float(moves.sum())
        share = moves * (vector.square().sum(dim=1, keepdim=True) * count + 0.05)
        wanted = moves * (tokens.reciprocal().square() * share).sqrt()
        inverse = moves * (wanted * count / float(wanted.sum())).clamp_min(1e-6)
        inverse = inverse * count / float(inverse.sum())  # after the clamp: the sum is what eq. 20 relies on
        return torch.where(moves > 0, inverse.rsqrt(), torch.ones_like(tokens))


def balanced_shares(parts: Float[Tensor, "s k"]) -> tuple[Float[Tensor, "k"], float]:
    """Shares theta (sum about 1) that minimise ``max_s sum_k parts_sk / theta_k``, and the root of a lower bound.

    For weights p on the rows, ``min_theta sum_k (p parts)_k / theta_k = (sum_k (p parts)_k^{1/2})^2`` by
    Cauchy-Schwarz, concave in p; exponentiated gradient steps raise it.
    """
    scaled = parts / nonzero(parts.max())
    weights = torch.full_like(scaled[:, 0], 1.0 / scaled.shape[0])
    best, value = weights, -1.0
    for step in range(BALANCE_STEPS if scaled.shape[0] > 1 else 1):
        roots = (weights @ scaled).clamp_min(SMALLEST_PART).sqrt()
        total = float(roots.sum())
        if total > value:
            best, value = weights, total
        gradient = total * (scaled / roots).sum(dim=1)
        weights = torch.softmax(
            weights.clamp_min(SMALLEST_PART).log() + 2.0 / (1.0 + 0.1 * step) * gradient / total**2, dim=0
        )
    roots = (best @ scaled).clamp_min(0.0).sqrt()
    return (roots / nonzero(roots.sum())).clamp_min(FLOOR), float(parts.max().sqrt()) * value
