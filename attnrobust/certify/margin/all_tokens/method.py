"""The margin certificate: exact first order, a proved quadratic majorant of the rest, one joint trust region."""

from functools import partial
from typing import ClassVar

import torch

from attnrobust.certify.margin.all_tokens.constants import (
    Constants,
    Largest,
    constants,
    largest_quadratic,
    row_geometry,
)
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve, rough_quadratic
from attnrobust.certify.margin.all_tokens.functional import FunctionalBound
from attnrobust.certify.margin.quadratic_form import functional_rows
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
ASIDE = 0.9  # share of its budget below which a class does not decide the radius
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
        self.functionals = [
            FunctionalBound(functional_rows(self.rows, weights, f), problem.moves, chance=self.chance)
            for f in goal.functionals
        ]

    @property
    def failure_probability(self) -> float:
        return self.chance.spent

    @property
    @torch.inference_mode(mode=False)  # the descent in the parameters differentiates, whatever mode the caller is in
    @torch.no_grad()
    def first_guess(self) -> float | None:
        """Classes whose first order spends their budget soonest come first, others are looked at near their radius."""
        slopes = [float(self.problem.moves.dual_norm(functional.rows.gradient)) for functional in self.functionals]
        firsts = [b / s if s > 0.0 else torch.inf for b, s in zip(self.budgets, slopes, strict=True)]
        guess = torch.inf
        for k in sorted(range(len(firsts)), key=firsts.__getitem__):
            budget, functional = self.budgets[k], self.functionals[k]
            if firsts[k] == torch.inf or functional.search.is_below(self.curve, ASIDE * budget, guess):
                continue
            start = min(START * firsts[k], guess)
            found = functional.choose_parameters(self.curve, budget, start, aim=AIM)
            if found < guess:
                guess, self.growth_of_worst = found, functional.search.growth
        return guess if guess < torch.inf else None

    @property
    def growth(self) -> float:
        return self.growth_of_worst

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
