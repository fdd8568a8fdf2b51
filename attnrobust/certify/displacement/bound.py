"""Displacement certificate: the bound at one problem, first order exact, one joint eigenvalue bound."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows, ValueRows
from attnrobust.certify.displacement.bilinear import QueryKeyForm, value_logit_form
from attnrobust.certify.displacement.joint_form import JointProduct
from attnrobust.certify.displacement.remainder import LogitForms, RemainderMajorant
from attnrobust.certify.displacement.search import RadiusSearch
from attnrobust.certify.displacement.shares import balanced_shares
from attnrobust.certify.displacement.trial import JointForm, Trial
from attnrobust.certify.method import PreparedBound
from attnrobust.certify.radius import LARGEST
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.chance import MAIN_FAILURE, Chance, stream
from attnrobust.numerics.linear_map import EigenvalueBounds, LinearMap, largest_eigenvalue_upper
from attnrobust.numerics.rounding import FORMULA, SMALLEST, SMALLEST_UNIT, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import PerTokenBall

EVENTS = 64  # eigenvalue bounds that a radius is likely to need
DENSE_LIMIT = 300  # n d up to which every eigenvalue is computed without randomness
POWER_STEPS = 8  # of the first guess
JUST_BELOW = 0.994  # share of the limit above which a smaller bound is not looked for
ENOUGH = 1.0 - 1e-8  # of the eigenvalue that meets the limit: it is still rounded outward
ROUNDS = 4  # rebalancing rounds of the joint bound
TOKEN_ROUNDS = 5  # the same where token scales adapt too
SETTLED = 2e-3  # relative distance to the least that any shares can give on the directions seen


@dataclass(eq=False)
class DisplacementBound(PreparedBound):
    """``||pooled(X0 + D) - pooled(X0)|| <= ||J D|| + mixing sum_k |L_k D|`` on the ball (eq. 4).

    Args:
        problem: The question.
        seed: Seed of random start vectors.
        clean: Clean rows of the same layer and input, whose work is shared; None computes them.
        chance: Failure probability to share with the bounds of other tokens; None means one of its own.
        sharp: The share itself is asked, not only whether it passes: no bound ends early because it suffices.
    """

    problem: Problem
    seed: int
    clean: ValueRows | None = None
    chance: Chance | None = None
    sharp: bool = False

    def __post_init__(self) -> None:
        layer, clean = self.problem.network, self.problem.clean
        assert isinstance(layer, Attention)  # noqa: S101 - `refuses` was asked first; narrows the type
        movable = self.problem.moves.movable(clean.n)
        weights = self.problem.resolved.weights
        shared = self.clean or ValueRows(layer, clean.points, self.problem.mass)
        if shared.layer is not layer or shared.points is not clean.points or shared.mass is not self.problem.mass:
            raise ValueError("the clean rows belong to another layer or input")
        rows = MovingRows(shared, weights, movable)
        jacobian = AttentionJacobian(layer, clean.points, self.problem.mass)
        self._jacobian: LinearMap = jacobian.linear_map(pool=weights, token_scale=rows.moves)
        majorant = RemainderMajorant(rows)
        self._chance = self.chance or Chance(self.seed, "displacement", MAIN_FAILURE, EVENTS)
        pair = value_logit_form(rows, seed=stream(self.seed, "value-logit"))
        joint = JointProduct(rows, majorant, pair, QueryKeyForm(rows))
        self._scale = self.problem.moves.frobenius_factor(clean.n, clean.width)
        self._first, direction = self._first_order()
        self._trial = Trial(rows, majorant, joint, [direction], torch.ones_like(clean.points[:, :1]))

    @property
    def rows(self) -> MovingRows:
        """The rows, and which tokens move."""
        return self._trial.rows

    @property
    def token_scales(self) -> Float[Tensor, "n 1"]:
        """The token scales of eq. 20."""
        return self._trial.token_scales

    def change_form(self, change: Callable[[JointForm], JointForm]) -> None:
        """Put another joint form in the place of the present one, whose first order or coordinates differ."""
        self._trial = replace(self._trial, joint=change(self._trial.joint), _joint=None, _values=[])

    def _first_order(self) -> tuple[float, Float[Tensor, "n d"]]:
        """A rough norm of J for the first guess (any value is sound) and the direction where it is reached."""
        generator, points = torch.Generator().manual_seed(stream(self.seed, "estimate")), self.problem.clean.points
        vector = torch.randn(points.shape, generator=generator, dtype=torch.float64).to(points)
        norm = 0.0
        for _ in range(POWER_STEPS):
            vector = self._jacobian.rmatvec(self._jacobian.matvec(vector / max(norm, SMALLEST) if norm else vector))
            norm = float(torch.linalg.vector_norm(vector))
        return max(math.sqrt(norm), SMALLEST_UNIT), vector / max(norm, SMALLEST)

    @property
    def failure_probability(self) -> float:
        return self._chance.spent

    @property
    def first_order_guess(self) -> float:
        """A radius from the first order alone."""
        return 0.7 * self.budget / (self._first * self._scale)

    @property
    def first_guess(self) -> float | None:
        """The radius that the search predicts."""
        guess = self.first_order_guess
        if not SMALLEST < guess * self._scale < LARGEST:
            return guess
        search = RadiusSearch(self._trial, self.budget, self._per_token)
        found = search.radius(guess * self._scale)
        return guess if found is None else found / self._scale

    @property
    def _per_token(self) -> bool:
        return isinstance(self.problem.threat, PerTokenBall)

    @cached_property
    def budget(self) -> float:
        """Allowed displacement."""
        return float(self.problem.resolved.budgets[0])

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share on the threat's set of this radius; infinite where constants overflow."""
        reach = radius * self._scale
        forms = self._trial.forms(reach)
        if not forms.finite:
            return Upper(math.inf)
        value = self._joint(forms, self._trial.scales(reach), self.budget / reach) * reach
        return Upper(used_share(value, self.budget, share=FORMULA), self.failure_probability)

    def _joint(self, forms: LogitForms, scales: Float[Tensor, "5"], limit: float) -> float:
        """Upper bound of ``sup over |D| = 1 of sum_k scales_k X_k(D)^{1/2}``: Cauchy-Schwarz with shares (eq. 19).

        Where token scales adapt, the best ones are kept for the next radius.
        """
        best, kept = math.inf, self.token_scales
        for value, used in self._rounds(forms, scales, limit):
            best, kept = (value, used) if value < best else (best, kept)
            if JUST_BELOW * limit <= best <= limit and not self.sharp:
                break
        if self._per_token:
            self._trial.rescale(kept)
        return best

    def _rounds(
        self, forms: LogitForms, scales: Float[Tensor, "5"], limit: float
    ) -> Iterator[tuple[float, Float[Tensor, "n 1"]]]:
        """Upper bounds with ever other shares, and the token scales of each.

        They end early once the bound is seen to stay above ``limit`` whatever the shares, or cannot fall much further.
        """
        best = math.inf
        for number in range(TOKEN_ROUNDS if self._per_token else ROUNDS):
            parts, used = self._trial.values(forms) * scales.square(), self.token_scales
            if not bool(torch.isfinite(parts).all()):  # a product left float64: this radius is not covered
                return
            shares, least = balanced_shares(parts)
            hopeless = least > limit and not self.sharp
            if number and (hopeless or best <= least * (1.0 + SETTLED)) and not self._per_token:
                return
            enough = 0.0 if self.sharp else ENOUGH * limit**2 / float(shares.sum())
            try:
                bounds = self._bounded(forms, scales.square() / shares, enough)
            except InputError:  # a product left float64 in another direction
                return
            self._chance.spend(bounds.upper.failure_probability)
            value = math.sqrt(max(bounds.upper.value, 0.0) * float(shares.sum()))
            best = min(best, value)
            self._trial.remember(bounds.vector, adapt=self._per_token)
            yield value, used

    def _bounded(self, forms: LogitForms, factors: Float[Tensor, "5"], enough: float) -> EigenvalueBounds:
        """The largest eigenvalue of the joint form with these factors."""
        size = int(self.rows.movable.sum()) * self.rows.clean.points.shape[1]
        share, seed = self._chance.next_event()
        return largest_eigenvalue_upper(
            self._trial.product(forms, factors), size, failure_probability=share, seed=seed, tol=2e-3,
            dense_limit=DENSE_LIMIT, enough=enough, device=self.rows.clean.points.device,
        )  # fmt: skip
