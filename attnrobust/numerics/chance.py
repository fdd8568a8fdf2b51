"""One failure probability for everything random behind one answer, and independent random streams by hashing."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from attnrobust.errors import InputError
from attnrobust.numerics.rounding import ENTRY, outward

ROW_FAILURE = 1e-9
"""All certificates of one input together fail with at most this probability: a union over methods, classes, tokens and
evaluations."""
MAIN_FAILURE = 0.7 * ROW_FAILURE
"""Of the one certificate of a row that iterates at every radius (margin or displacement)."""
SIDE_FAILURE = 0.1 * ROW_FAILURE
"""Of a certificate whose random part is one first-order bound; a row has at most three of them."""
EXPECTED = 0.8
"""Part of a total that the expected number of events shares equally; any further ones share the rest."""


def stream(seed: int, *labels: object) -> int:
    """Seed of one random stream: a hash of the run's seed and of what the stream is for.

    Args:
        seed: The run's seed.
        labels: Method, class, token, number of the evaluation; different labels give independent streams.
    """
    text = ";".join(map(repr, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def union_bound(probabilities: Iterable[float]) -> float:
    """Upper bound of the probability that any of several events happens, dependent or not."""
    return min(1.0, outward(math.fsum(probabilities), ENTRY))


@dataclass(eq=False)
class Chance:
    """A failure probability that any number of random events share.

    The first ``expected`` events get equal shares of 80 %, the k-th one after them ``20 % 6 / (pi^2 k^2)``: the shares
    sum to the total, however many events there will be. Small shares cost accuracy (rounding over share, see
    ``numerics.lanczos``). Events need not be independent; one that depends on earlier outcomes needs its own stream.

    Args:
        seed: The run's seed.
        purpose: Tells the streams of different purposes apart.
        total: What all events together may fail with.
        expected: Events that are likely to be needed.
    """

    seed: int
    purpose: str
    total: float
    expected: int
    spent: float = field(default=0.0, init=False)
    events: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not (0.0 < self.total < 1.0 and self.expected >= 1):
            raise InputError(f"need a failure probability in (0, 1) and events >= 1; got {self.total}, {self.expected}")

    def next_event(self) -> tuple[float, int]:
        """Failure probability and seed of the next random event."""
        self.events += 1
        late = self.events - self.expected
        part = EXPECTED / self.expected if late <= 0 else (1.0 - EXPECTED) * 6.0 / (math.pi**2 * late**2)
        return self.total * part * (1.0 - 1e-12), stream(self.seed, self.purpose, self.events)

    def spend(self, probability: float) -> None:
        """Record what an event did rely on (0 where a matrix was decomposed instead)."""
        self.spent += probability
