"""The bound of one margin functional: a search for good parameters, then a proof with them."""

import math
from collections.abc import Sequence

from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve
from attnrobust.certify.margin.all_tokens.proof import proved_drop
from attnrobust.certify.margin.all_tokens.region import Coordinates
from attnrobust.certify.margin.all_tokens.search import DropSearch
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.numerics.chance import Chance, stream
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import MoveThreat

ASIDE = 0.9  # share of its budget below which a class does not decide the radius


class FunctionalBound:
    """Bounds of the drop of one functional; parameters are kept between radii.

    Args:
        rows: The functional.
        threat: The threat.
        chance: Failure probability to spend.
        coordinates: What the trust region is about, where that is not the moves themselves.
    """

    def __init__(
        self, rows: FunctionalRows, threat: MoveThreat, *, chance: Chance, coordinates: Coordinates | None = None
    ) -> None:
        self.rows, self.threat, self.chance = rows, threat, chance
        self.coordinates = coordinates or Coordinates(rows.rows)
        seed = stream(chance.seed, chance.purpose)
        self.search = DropSearch(rows, threat, seed=seed, coordinates=self.coordinates)

    def choose_parameters(self, curve: ConstantsCurve, budget: float, radius: float, *, aim: float) -> float:
        """Search parameters and the radius where the bound is that share of the budget; a guess of that radius."""
        return self.search.choose(curve, budget, radius, aim=aim)

    def bound(self, const: Constants) -> Upper:
        """Upper bound of the drop on the set with these constants."""
        choice = self.search.at(const)
        return proved_drop(self.rows, self.threat, const, choice, chance=self.chance, coordinates=self.coordinates)


def chosen_radius(
    functionals: Sequence[FunctionalBound],
    budgets: Sequence[float],
    firsts: Sequence[float],
    curve: ConstantsCurve,
    *,
    aim: float,
) -> tuple[float, float]:
    """Choose the parameters of the functionals that decide the radius; a guess of it and the exponent of the bound.

    Those whose first order spends their budget soonest come first, others are looked at near their radius.

    Args:
        functionals: One of each class.
        budgets: What each may drop by.
        firsts: Where the search of each starts; infinite where it has no first order.
        curve: Constants of a radius.
        aim: Share of the budget that a first proof should use.

    Returns:
        Infinity as the guess where no functional has a first order.
    """
    guess, growth = math.inf, 1.0
    for k in sorted(range(len(firsts)), key=firsts.__getitem__):
        budget, functional = budgets[k], functionals[k]
        if firsts[k] == math.inf or functional.search.is_below(curve, ASIDE * budget, guess):
            continue
        found = functional.choose_parameters(curve, budget, min(firsts[k], guess), aim=aim)
        if found < guess:
            guess, growth = found, functional.search.growth
    return guess, growth
