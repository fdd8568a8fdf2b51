"""One token moves, and the adversary chooses which: the worst of one bound per token."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnrobust.certify.method import PreparedBound
from attnrobust.numerics.chance import union_bound
from attnrobust.numerics.rounding import worst
from attnrobust.numerics.sides import Upper


@dataclass(eq=False)
class WorstBranch(PreparedBound):
    """The largest usage over the pieces of a threat's set.

    Args:
        branches: A bound per piece; their failure probabilities add up.
    """

    branches: Sequence[PreparedBound]

    @property
    def failure_probability(self) -> float:
        return union_bound(branch.failure_probability for branch in self.branches)

    @property
    def first_guess(self) -> float | None:
        guesses = [branch.first_guess for branch in self.branches]
        return min((guess for guess in guesses if guess is not None), default=None)

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share, whichever token moves."""
        return Upper(worst(branch.usage(radius).value for branch in self.branches), self.failure_probability)
