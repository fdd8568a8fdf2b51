"""From a bound on the used budget to a certified radius: the safe end of a search with few evaluations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from attnrobust.errors import InputError

SMALLEST, LARGEST = 1e-12, 1e12  # radii outside are reported as 0 / LARGEST; token norms are far inside
MAX_EVALUATIONS = 200
GROWTH_RANGE = (0.5, 30.0)  # exponents p of a local fit usage ~ r^p that a step may trust
NARROW = 0.05  # logarithm of a used share that misses 1 by so little that the next radius is aimed at, not cut
EXACT = 1.01  # a radius within this factor of one that is known to be out of reach is not worth a finer search
BELOW = 0.9  # of that radius: where a first guess beyond it is put


def largest_radius(
    usage: Callable[[float], float],
    *,
    first_guess: float | None = None,
    relative_tolerance: float = 1e-3,
    growth: float = 1.0,
    ceiling: float = math.inf,
) -> tuple[float, int]:
    """Search the largest r with ``usage(r) <= 1``; the returned r was itself evaluated and passed.

    Bounds grow like a power of r between first and higher order, so each step fits ``usage ~ r^p`` to the two points
    nearest to 1 and aims just below 1; every third step inside a bracket bisects it in log r. The search ends when the
    bracket is narrow, or when the passed point uses so much of the budget that a bound which grows at least like
    ``r^growth`` leaves no more than the tolerance. No monotonicity is assumed for soundness.

    A ceiling saves evaluations that a right bound must fail. Right above it one radius is still tried before the search
    ends near it; where that passes, the bound contradicts what set the ceiling, and the search goes on without it, so
    that the contradiction shows.

    Args:
        usage: Upper bound of the used budget share on the set of radius r; infinity allowed, NaN is an error.
        first_guess: Where to start; default 1.
        relative_tolerance: How much of the radius may be given away.
        growth: Exponent p of ``usage ~ r^p`` that is assumed where a single evaluation has to do.
        ceiling: A radius that no right bound certifies, as that of a verified attack; within 1 % of it the search ends.

    Returns:
        (radius, evaluations); radius 0.0 when nothing >= 1e-12 passes.

    Raises:
        InputError: The bound returned NaN, a tolerance that is not in (0, 1), or a ceiling that is negative or NaN.
    """
    if not 0.0 < relative_tolerance < 1.0:
        raise InputError(f"relative_tolerance must be in (0, 1); got {relative_tolerance}")
    if not ceiling >= 0.0:
        raise InputError(f"the ceiling must be >= 0; got {ceiling}")
    search = _Search(relative_tolerance, ceiling=ceiling, growth=growth)
    radius = first_guess if first_guess is not None and SMALLEST < first_guess < LARGEST else 1.0
    radius = max(min(radius, BELOW * ceiling), SMALLEST)
    for evaluations in range(1, MAX_EVALUATIONS + 1):
        value = usage(radius)
        if math.isnan(value):
            raise InputError(f"the bound returned NaN at radius {radius:g}")
        search.record(radius, value)
        if search.finished:
            return search.passed, evaluations
        radius = search.within(search.next_radius())
    return search.passed, MAX_EVALUATIONS


@dataclass
class _Search:
    """The bracket (largest passed, smallest failed above it) and the finite points seen so far."""

    tolerance: float
    ceiling: float = math.inf
    growth: float = 1.0
    passed: float = 0.0
    failed: float = math.inf
    passed_usage: float = 0.0
    bracketed_steps: int = 0
    rising_steps: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)

    def record(self, radius: float, value: float) -> None:
        if value <= 1.0:
            if radius > self.passed:
                self.passed, self.passed_usage = radius, value
                if self.failed <= self.passed:  # a bound that is not monotone: what failed below does not bound us
                    self.failed = math.inf
        elif radius > self.passed:
            self.failed = min(self.failed, radius)
        if 0.0 < value < math.inf:
            self.points.append((math.log(radius), math.log(value)))

    @property
    def finished(self) -> bool:
        if self.passed >= LARGEST or (self.passed == 0.0 and self.failed <= SMALLEST):
            return True
        if self.near_ceiling and self.failed <= self.above_ceiling:
            return True
        return self.passed > 0 and (
            self.failed <= self.passed * (1 + self.tolerance)
            or self.passed_usage >= (1 + self.tolerance) ** -self.growth
        )

    @property
    def above_ceiling(self) -> float:
        """The only radius beyond the ceiling that is tried while no larger one passed."""
        return max(self.ceiling * (1 + self.tolerance), SMALLEST)

    @property
    def near_ceiling(self) -> bool:
        return self.passed <= self.ceiling <= EXACT * self.passed

    def within(self, radius: float) -> float:
        """The next radius, as far as the ceiling lets it."""
        if self.passed > self.ceiling:
            return radius
        return self.above_ceiling if self.near_ceiling else min(radius, self.above_ceiling)

    def next_radius(self) -> float:
        aim = self._fitted()
        if self.passed == 0.0:  # only failures so far
            narrow = any(0.0 < log_u < NARROW and log_r <= math.log(self.failed) + 1e-9 for log_r, log_u in self.points)
            high = self.failed / (1 + self.tolerance / 2) if narrow else self.failed * 0.9
            return max(min(aim if aim is not None else self.failed * 1e-2, high), self.failed * 1e-3, SMALLEST / 2)
        if self.failed == math.inf:  # only successes so far
            self.rising_steps += 1  # ever longer steps, for a bound that stays below 1 for ever
            least = max(1 + self.tolerance, 1.5 ** (self.rising_steps - 3))
            low, high = self.passed * least, min(self.passed * 1e3, LARGEST)
            return min(max(aim if aim is not None else high, low), high)
        self.bracketed_steps += 1
        low, high = self.passed * (1 + self.tolerance / 2), self.failed / (1 + self.tolerance / 2)
        if aim is None or self.bracketed_steps % 3 == 0:
            return math.sqrt(self.passed * self.failed)
        return min(max(aim, low), high) if low < high else math.sqrt(self.passed * self.failed)

    def _fitted(self) -> float | None:
        """Where the power law through the two points nearest to usage 1 reaches the middle of the accepted range."""
        if not self.points:
            return None
        newest_first = self.points[::-1]
        nearest = sorted(newest_first, key=lambda point: abs(point[1]))[:2]  # stable: the newest among equals
        log_r, log_u = nearest[0]
        power = self.growth
        if len(nearest) == 2 and nearest[1][0] != log_r:
            power = (nearest[1][1] - log_u) / (nearest[1][0] - log_r)
        power = min(max(power, GROWTH_RANGE[0]), GROWTH_RANGE[1])
        step = (-0.5 * math.log1p(self.tolerance) - log_u) / power
        return math.exp(min(max(log_r + step, math.log(SMALLEST / 2)), math.log(LARGEST)))
