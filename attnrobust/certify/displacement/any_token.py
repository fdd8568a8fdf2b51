"""Displacement certificate under "any one token": the worst of the bounds for one known token each."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

from attnrobust.certify.displacement.base import ValueRows
from attnrobust.certify.displacement.bound import EVENTS, DisplacementBound
from attnrobust.certify.method import PreparedBound
from attnrobust.certify.radius import largest_radius
from attnrobust.numerics.chance import MAIN_FAILURE, Chance, stream
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall

TOKEN_LIMIT = 128  # tokens that move in turn; beyond, the enclosing ball has to do
EVENTS_OF_A_TOKEN = 6  # eigenvalue bounds of a token that is not the worst
MOST_EVENTS = 256  # bounds that share equally: smaller shares cost all of them their accuracy
KEPT_NUMBERS = 2**18  # rows times rows of the tokens' bounds that are kept; a bound holds about 150 numbers of each


@dataclass(eq=False)
class AnyTokenBound(PreparedBound):
    """``usage(r) = max over j of usage_j(r)``, j the only token that moves: the threat's set is the union (docs 5).

    Every ``usage_j`` has its own constants and its own first order ``||J_{:,j}||``. A token that passed at a radius
    passes below it, so it is not looked at again there.

    Args:
        problem: The question; its threat is ``AnyToken``.
        seed: Seed of random start vectors.
        tolerance: Relative accuracy of the radius of the worst token.
        sharp: The share itself is asked, not only whether it passes: a token is looked at again at every radius.
    """

    problem: Problem
    seed: int
    tolerance: float
    sharp: bool = False
    _passed: dict[int, tuple[float, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        threat, clean = self.problem.threat, self.problem.clean
        if not isinstance(threat, AnyToken):
            raise TypeError(f"the threat is {threat.key}, not any-token")
        self._tokens: list[FrobeniusBall] = list(threat.branches(clean.n))
        self._clean: ValueRows | None = None
        self._bounds: dict[int, DisplacementBound] = {}
        self._chance = Chance(
            self.seed,
            "displacement any-token",
            MAIN_FAILURE,
            min(EVENTS + EVENTS_OF_A_TOKEN * len(self._tokens), MOST_EVENTS),
        )

    @property
    def failure_probability(self) -> float:
        return self._chance.spent

    @property
    def first_guess(self) -> float | None:
        """The smallest of the tokens' radii; a token is searched only where it is the worst so far."""
        radius = math.inf
        for index in self._by_first_order():
            if radius < math.inf and self.usage_of(index, radius) <= 1.0:
                continue
            guess = self.bound_of(index).first_guess if radius == math.inf else 0.9 * radius
            usage = partial(self.usage_of, index)
            found, _ = largest_radius(usage, first_guess=guess, relative_tolerance=self.tolerance)
            radius = min(radius, found)
            if radius == 0.0:  # nothing passes for this token, so nothing passes
                return None
        return radius if radius < math.inf else None

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share on the threat's set of this radius; infinite where constants overflow."""
        return Upper(max(self.usage_of(index, radius) for index in range(len(self._tokens))), self.failure_probability)

    def usage_of(self, index: int, radius: float) -> float:
        """Upper bound of the used share while token ``index`` of the threat is the one that moves."""
        known = self._passed.get(index)
        if known is not None and (radius == known[0] or (radius < known[0] and not self.sharp)):
            return known[1]
        value = self.bound_of(index).usage(radius).value
        if value <= 1.0:
            self._passed[index] = (radius, value)
        return value

    def _by_first_order(self) -> list[int]:
        """Tokens, the one with the largest first order first."""
        guesses = [self.bound_of(index).first_order_guess for index in range(len(self._tokens))]
        return sorted(range(len(guesses)), key=guesses.__getitem__)

    def bound_of(self, index: int) -> DisplacementBound:
        if index not in self._bounds:
            if len(self._bounds) * self.problem.clean.n**2 >= KEPT_NUMBERS:
                self._bounds.clear()
            one = replace(self.problem, threat=self._tokens[index])
            bound = DisplacementBound(
                one, stream(self.seed, self._tokens[index].key), self._clean, self._chance, sharp=self.sharp
            )
            self._clean = bound.rows.clean
            self._bounds[index] = bound
        return self._bounds[index]
