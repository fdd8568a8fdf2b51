"""The margin certificate: exact first order, a proved quadratic majorant of the rest, one joint trust region."""

import math
from functools import partial
from typing import ClassVar

import torch
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
from attnrobust.certify.margin.quadratic_form import functional_rows
from attnrobust.certify.margin.reduced_rows import reduced
from attnrobust.certify.margin.rows import margin_rows
from attnrobust.certify.method import MODERN_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.chance import MAIN_FAILURE, Chance
from attnrobust.numerics.rounding import used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall

EVENTS_OF_A_CLASS = 12  # random starts that a class is likely to need
EVENTS = (32, 80)  # least and most starts that share equally: shares far below 1e-11 cost the bound its accuracy
TOLERANCE = 6e-3  # of the radius search
AIM = 1.0 - 0.5 * TOLERANCE  # share of the budget that a first proof should use: one is then enough
MOST_GROWTH = 2.0  # that the end of a radius search trusts
START = 0.6  # of the radius that the first order alone would give
EXPONENT_CAP = 650.0  # logit changes beyond say nothing useful and would overflow


class MarginCertificate(CertificateMethod):
    """Quadratic majorant of the drop of each margin, maximised by one trust region over all tokens, heads and rows.

    ``drop(D) <= c + G'.D + D M(r) D / 2`` on the whole set. With references 0, c = 0 and G' is minus the gradient
    of the margin; M(r) then tends to minus its Hessian as r -> 0.
    """

    name: ClassVar[str] = "margin-majorant"
    reference: ClassVar[str] = "derived; docs/margin-certificate.md, Theorem 1"
    region: ClassVar[str] = "every perturbation with threat distance at most the radius"
    kind: ClassVar[Kind] = Kind.FLOAT64
    relative_tolerance: ClassVar[float] = TOLERANCE
    layers = (Attention,)
    features = MODERN_FEATURES
    threats = (FrobeniusBall, PerTokenBall)
    goals = (Margin,)

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return MarginBound(problem, seed=seed)


class MarginBound(PreparedBound):
    """The majorant of every class at one problem, warm-started from radius to radius."""

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.rows = margin_rows(problem, asked=True)
        self.geometry = row_geometry(self.rows, problem.moves)
        goal = problem.resolved
        assert goal.functionals is not None and goal.weights is not None  # noqa: S101,PT018 - refused before
        self.budgets = goal.budgets.tolist()
        weights = goal.weights[self.rows.asked].clone()  # made in inference mode, they could not enter a slope
        events = min(max(EVENTS[0], EVENTS_OF_A_CLASS * goal.functionals.shape[0]), EVENTS[1])
        self.growth_of_worst = 1.0
        self.chance = Chance(seed, "margin", MAIN_FAILURE, events)
        self.curve = ConstantsCurve(self.constants_at, partial(self.constants_at, largest=rough_quadratic))
        found = [functional_rows(self.rows, weights, f) for f in goal.functionals]
        if isinstance(problem.threat, FrobeniusBall):
            found = reduced(found)
        self.functionals = [FunctionalBound(one, problem.moves, chance=self.chance) for one in found]

    @property
    def failure_probability(self) -> float:
        return self.chance.spent

    @property
    @torch.inference_mode(mode=False)  # the descent in the parameters differentiates, whatever mode the caller is in
    @torch.no_grad()
    def first_guess(self) -> float | None:
        slopes = [float(self._slope(functional.rows.gradient)) for functional in self.functionals]
        firsts = [START * b / s if s > 0.0 else math.inf for b, s in zip(self.budgets, slopes, strict=True)]
        guess, self.growth_of_worst = chosen_radius(self.functionals, self.budgets, firsts, self.curve, aim=AIM)
        return guess if guess < math.inf else None

    def _slope(self, gradient: Tensor) -> Tensor:
        """Largest linear change per unit of the threat; the length where moves are in a basis of their own."""
        reduced_moves = gradient.shape != self.rows.points.shape
        return torch.linalg.vector_norm(gradient) if reduced_moves else self.problem.moves.dual_norm(gradient)

    @property
    def growth(self) -> float:
        return min(self.growth_of_worst, MOST_GROWTH)

    def constants_at(self, radius: float, *, largest: Largest = largest_quadratic) -> Constants | None:
        """Constants of the threat's set of this radius; None where they overflow."""
        threat, (n, d) = self.problem.moves, self.rows.points.shape
        budget = MoveBudget(
            frobenius=radius * threat.frobenius_factor(n, d), token=radius * threat.token_factor(n, d), epsilon=radius
        )
        const = constants(self.rows, self.geometry, budget, largest=largest)
        return const if bool((const.limit < EXPONENT_CAP).all()) else None

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        const = self.curve.known(radius)
        if const is None:
            return Upper(torch.inf)
        worst = 0.0
        for one_budget, functional in zip(self.budgets, self.functionals, strict=True):
            bound = functional.bound(const)
            worst = max(worst, used_share(bound.value, one_budget))
            if worst == torch.inf:
                break
        return Upper(worst, self.failure_probability)
