"""The margin certificate with the derivative of the norm inside: one trust region over the moves of hidden states."""

import math
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import (
    Constants,
    Largest,
    constants,
    largest_quadratic,
    row_geometry,
)
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve, rough_quadratic
from attnrobust.certify.margin.all_tokens.functional import FunctionalBound, chosen_radius
from attnrobust.certify.margin.all_tokens.method import EVENTS, EVENTS_OF_A_CLASS, EXPONENT_CAP, MOST_GROWTH, START
from attnrobust.certify.margin.all_tokens.region import Coordinates, Ellipsoid
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

HALVINGS = 40  # of a bracket of a radius


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
        self.firsts = [_linear_radius(rows, own, b) for (rows, own), b in zip(found, self.budgets, strict=True)]
        self.ellipsoids = Ellipsoids.near(self.front, min(self.firsts, default=math.inf))
        self.functionals = [FrontFunctional(rows, self.ellipsoids, own, chance=self.chance) for rows, own in found]
        self.curve = ConstantsCurve(self.constants_at, partial(self.constants_at, largest=rough_quadratic))
        self.growth_of_worst = 1.0

    @property
    def failure_probability(self) -> float:
        return self.chance.spent

    @property
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def first_guess(self) -> float | None:
        shortest = float(self.front.lengths[self.front.movable].min())
        starts = [START * min(first, shortest) if first < math.inf else first for first in self.firsts]
        left = [
            max(budget - functional.own.error(start), 0.5 * budget) if start < math.inf else budget
            for budget, functional, start in zip(self.budgets, self.functionals, starts, strict=True)
        ]
        sizes = [self.ellipsoids.reach(start) for start in starts]
        aim = 1.0 - 0.5 * PreNormMargin.relative_tolerance
        guess, self.growth_of_worst = chosen_radius(self.functionals, left, sizes, self.curve, aim=aim)
        return self._radius_of(guess) if guess < math.inf else None

    @property
    def growth(self) -> float:
        return min(self.growth_of_worst, MOST_GROWTH)

    def _radius_of(self, size: float) -> float:
        """About the radius at which d' may be as long as this: ``reach`` grows at least like ``steepest r``."""
        low, high = 0.0, size / self.front.steepest
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            within = self.ellipsoids.reach(middle, free=self.front.layer.residual) <= size
            low, high = (middle, high) if within else (low, middle)
        return 0.5 * (low + high)

    def constants_at(self, size: float, *, largest: Largest = largest_quadratic) -> Constants | None:
        """Constants of the Frobenius ball of this size around the normalised tokens; None where they overflow."""
        budget = MoveBudget(frobenius=size, token=size, epsilon=size)
        const = constants(self.rows, self.geometry, budget, largest=largest)
        return const if bool((const.limit < EXPONENT_CAP).all()) else None

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        size = self.ellipsoids.reach(radius, free=self.front.layer.residual)
        const = None if size == math.inf else self.curve.known(size)
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
        super().__init__(rows, FrobeniusBall(), chance=chance, coordinates=FrontCoordinates(rows.rows, ellipsoids, own))
        self.own = own


class FrontCoordinates(Coordinates):
    """d' of the movable tokens, and where the tokens are added to the output one number for the unseen moves.

    Args:
        rows: The rows at the normalised tokens.
        ellipsoids: The maps from d' to moves of the normalised tokens.
        own: What the tokens' own moves take away.
    """

    def __init__(self, rows: MarginRows, ellipsoids: Ellipsoids, own: OwnMoves) -> None:
        super().__init__(rows)
        self.ellipsoids, self.own = ellipsoids, own
        self.size = int(self.index.sum()) * self.shape[1]

    def quadratic(self, form: QuadraticMajorant, region: Ellipsoid) -> Quadratic:
        def product(flat: Tensor) -> Tensor:
            image = self.taken(self.ellipsoids.apply(form.apply(self.moves(flat, region)))).flatten(-2)
            return torch.cat([image, torch.zeros_like(flat[..., self.size :])], dim=-1)

        steepest = self.own.front.steepest
        gradient = self.ellipsoids.apply(form.gradient) + self.own.tangential.to(form.gradient) / steepest
        parts = [self.taken(gradient).flatten()]
        if self.own.front.layer.residual:
            parts.append(gradient.new_tensor([self.own.unseen / steepest]))
        return Quadratic(product, torch.cat(parts), float(form.constant))

    def moves(self, flat: Float[Tensor, "*b N"], region: Ellipsoid) -> Float[Tensor, "*b m p"]:
        part = flat[..., : self.size].unflatten(-1, (-1, self.shape[1]))
        return self.ellipsoids.apply(self.placed(part))

    def kept(self, flat: Float[Tensor, "*b N"], region: Ellipsoid) -> Tensor:
        return flat

    def again(self, kept: Tensor, region: Ellipsoid) -> Float[Tensor, "b N"]:
        return kept
