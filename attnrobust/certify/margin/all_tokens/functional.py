"""The bound of one margin functional: a search for good parameters, then a proof with them."""

from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve
from attnrobust.certify.margin.all_tokens.proof import proved_drop
from attnrobust.certify.margin.all_tokens.search import DropSearch
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.numerics.chance import Chance, stream
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import MoveThreat


class FunctionalBound:
    """Bounds of the drop of one functional; parameters are kept between radii."""

    def __init__(self, rows: FunctionalRows, threat: MoveThreat, *, chance: Chance) -> None:
        self.rows, self.threat, self.chance = rows, threat, chance
        self.search = DropSearch(rows, threat, seed=stream(chance.seed, chance.purpose))

    def choose_parameters(self, curve: ConstantsCurve, budget: float, radius: float, *, aim: float) -> float:
        """Search parameters and the radius where the bound is that share of the budget; a guess of that radius."""
        return self.search.choose(curve, budget, radius, aim=aim)

    def bound(self, const: Constants) -> Upper:
        """Upper bound of the drop on the set with these constants."""
        return proved_drop(self.rows, self.threat, const, self.search.at(const), chance=self.chance)
