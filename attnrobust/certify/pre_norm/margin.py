"""The margin certificate with the derivative of the norm inside: one trust region over the moves of hidden states."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Constants, constants, row_geometry
from attnrobust.certify.margin.all_tokens.functional import Ellipsoid, FunctionalBound
from attnrobust.certify.margin.all_tokens.method import EVENTS, EVENTS_OF_A_CLASS, EXPONENT_CAP, START
from attnrobust.certify.margin.quadratic_form import FunctionalRows, QuadraticMajorant, functional_rows
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.margin.trust_region import Quadratic
from attnrobust.certify.method import PRE_NORM_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.pre_norm.own_moves import OwnMoves
from attnrobust.certify.pre_norm.question import front_of, layer_of
from attnrobust.certify.pre_norm.sphere import Ellipsoids
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.goals import Margin
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.numerics.chance import MAIN_FAILURE, Chance
from attnrobust.numerics.rounding import used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall


class PreNormMargin(CertificateMethod):
    """Majorant of the attention's drop on the ellipsoids that hold the normalised tokens, and the tokens' own drop.

    References:
        Derived; docs/pre-norm-certificates.md, theorem 2.
    """

    name: ClassVar[str] = "pre-norm-margin"
    reference: ClassVar[str] = "derived; docs/pre-norm-certificates.md, theorem 2"
    region: ClassVar[str] = "every move of hidden states with threat distance at most the radius"
    relative_tolerance: ClassVar[float] = 3e-3
    layers = (PreNormAttention,)
    features = PRE_NORM_FEATURES
    threats = (FrobeniusBall,)
    goals = (Margin,)

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return PreNormMarginBound(problem, seed=seed)


class PreNormMarginBound(PreparedBound):
    """The majorants of all classes at one problem, in the coordinates d' of the ellipsoids."""

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, problem: Problem, *, seed: int) -> None:
        layer, goal = layer_of(problem), problem.resolved
        assert goal.functionals is not None and goal.weights is not None  # noqa: S101,PT018 - refused before
        self.front = front_of(problem)
        at = None if bool((goal.weights != 0).all()) else goal.weights.nonzero().flatten()
        movable = self.front.movable.to(problem.clean.points)
        self.rows = MarginRows(
            layer.folded, layer.unit(problem.clean.points), problem.mass, at,
            movable=movable, lengths=self.front.relative,
        )  # fmt: skip
        self.geometry = row_geometry(self.rows, FrobeniusBall())
        self.budgets = goal.budgets.tolist()
        events = min(max(EVENTS[0], EVENTS_OF_A_CLASS * goal.functionals.shape[0]), EVENTS[1])
        self.chance = Chance(seed, "pre-norm margin", MAIN_FAILURE, events)
        weights = goal.weights.clone()
        found = [
            (functional_rows(self.rows, weights[self.rows.asked], f), OwnMoves.of(self.front, weights, f))
            for f in goal.functionals
        ]
        self.guess = min(
            (_linear_radius(rows, own, b) for (rows, own), b in zip(found, self.budgets, strict=True)), default=math.inf
        )
        self.ellipsoids = Ellipsoids.near(self.front, self.guess)
        self.functionals = [FrontFunctional(rows, self.ellipsoids, own, chance=self.chance) for rows, own in found]

    @property
    def failure_probability(self) -> float:
        return self.chance.spent

    @property
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def first_guess(self) -> float | None:
        if not self.guess < math.inf:
            return None
        shortest = float(self.front.lengths[self.front.movable].min())
        size = self.ellipsoids.reach(START * min(self.guess, shortest))
        guesses = [
            functional.choose_parameters(self.constants_at, budget, size) / self.front.steepest
            for budget, functional in zip(self.budgets, self.functionals, strict=True)
        ]
        return min(guesses, default=None)

    def constants_at(self, size: float) -> Constants | None:
        """Constants of the Frobenius ball of this size around the normalised tokens; None where they overflow."""
        const = constants(self.rows, self.geometry, MoveBudget(frobenius=size, token=size, epsilon=size))
        return const if bool((const.limit < EXPONENT_CAP).all()) else None

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        size = self.ellipsoids.reach(radius, free=self.front.layer.residual)
        const = None if size == math.inf else self.constants_at(size)
        if const is None:
            return Upper(math.inf)
        worst = 0.0
        for budget, functional in zip(self.budgets, self.functionals, strict=True):
            value = functional.bound(const).value + functional.own.error(radius)
            worst = max(worst, used_share(value, budget))
            if worst == math.inf:
                break
        return Upper(worst, self.failure_probability)


def _linear_radius(rows: FunctionalRows, own: OwnMoves, budget: float) -> float:
    """The radius that the first order alone would give, up to the part along each token."""
    gradient = own.front.relative[:, None] * rows.gradient * own.front.steepest + own.tangential
    slope = float(torch.linalg.vector_norm(gradient))
    return budget / slope if slope > 0.0 else math.inf


class FrontFunctional(FunctionalBound):
    """Bounds of the drop of one functional; the variables of its trust region are d', and one for unseen moves.

    Args:
        rows: The functional's rows at the normalised tokens.
        ellipsoids: The maps from d' to moves of the normalised tokens.
        own: What the tokens' own moves take away.
        chance: Failure probability to spend.
    """

    def __init__(self, rows: FunctionalRows, ellipsoids: Ellipsoids, own: OwnMoves, *, chance: Chance) -> None:
        super().__init__(rows, FrobeniusBall(), chance=chance)
        self.ellipsoids, self.own = ellipsoids, own

    def _quadratic(self, form: QuadraticMajorant, region: Ellipsoid) -> Quadratic:
        index, shape = self.index, self.rows.rows.points.shape
        size = int(index.sum()) * shape[1]

        def product(flat: Tensor) -> Tensor:
            full = flat.new_zeros(*flat.shape[:-1], *shape)
            full[..., index, :] = flat[..., :size].reshape(*flat.shape[:-1], -1, shape[1])
            image = self.ellipsoids.apply(form.apply(self.ellipsoids.apply(full)))
            return torch.cat([image[..., index, :].flatten(-2), torch.zeros_like(flat[..., size:])], dim=-1)

        gradient = self.ellipsoids.apply(form.gradient) + self.own.tangential / self.own.front.steepest
        parts = [gradient[index].flatten()]
        if self.own.front.layer.residual:
            parts.append(gradient.new_tensor([self.own.unseen / self.own.front.steepest]))
        return Quadratic(product, torch.cat(parts), float(form.constant))

    def _moves(self, points: Tensor, region: Ellipsoid) -> Float[Tensor, "b n d"]:
        size = int(self.index.sum()) * self.rows.rows.points.shape[1]
        return self.ellipsoids.apply(super()._moves(points[:, :size], region))
