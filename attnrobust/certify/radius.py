"""From a bound on the used budget to a certified radius: the safe end of a search."""

import math
from collections.abc import Callable

from attnrobust.errors import InputError

SMALLEST, LARGEST = 1e-12, 1e12  # radii outside are reported as 0 / LARGEST; token norms are far inside
MAX_EVALUATIONS = 200


def largest_radius(
    usage: Callable[[float], float], *, first_guess: float | None = None, relative_tolerance: float = 1e-3
) -> tuple[float, int]:
    """Search the largest r with ``usage(r) <= 1``; the returned r was itself evaluated and passed.

    The usage is nearly proportional to r on real layers, so each step divides by it (a secant through 0); bisection in
    log r takes over inside a bracket. No monotonicity is assumed for soundness: only passed radii are returned.

    Args:
        usage: Upper bound of the used budget share on the set of radius r; infinity allowed, NaN is an error.
        first_guess: Where to start; default 1.
        relative_tolerance: Stop when failed / passed <= 1 + this.

    Returns:
        (radius, evaluations); radius 0.0 when nothing >= 1e-12 passes.

    Raises:
        InputError: The bound returned NaN, or a tolerance that is not in (0, 1).
    """
    if not 0.0 < relative_tolerance < 1.0:
        raise InputError(f"relative_tolerance must be in (0, 1); got {relative_tolerance}")
    passed, failed = 0.0, math.inf
    passed_usage = 0.0
    radius = first_guess if first_guess is not None and SMALLEST < first_guess < LARGEST else 1.0
    for evaluations in range(1, MAX_EVALUATIONS + 1):
        value = usage(radius)
        if math.isnan(value):
            raise InputError(f"the bound returned NaN at radius {radius:g}")
        if value <= 1.0:
            passed, passed_usage = max(passed, radius), value
        else:
            failed = min(failed, radius)
        if failed <= SMALLEST or passed >= LARGEST or (passed > 0 and failed <= passed * (1 + relative_tolerance)):
            return passed, evaluations
        radius = _next_radius(passed, failed, passed_usage, value, relative_tolerance)
    return passed, MAX_EVALUATIONS


def _next_radius(passed: float, failed: float, passed_usage: float, value: float, tolerance: float) -> float:
    if passed == 0.0:  # only failures so far: secant through 0, at least a halving, at most a thousandfold cut
        shrink = 0.95 / value if math.isfinite(value) else 1e-2
        return max(failed * min(max(shrink, 1e-3), 0.5 if value > 2.0 else 0.9), SMALLEST / 2)
    if failed == math.inf:  # only successes: aim past the target, at least 2 %
        return min(passed * min(max(1.05 / max(passed_usage, 1e-9), 1.02), 1e3), LARGEST)
    middle = math.sqrt(passed * failed)
    # Inside the bracket the secant aims at the target from the passed side; keep it away from both ends.
    secant = passed * (1.0 + 0.8 * (1.0 / max(passed_usage, 1e-9) - 1.0))
    low, high = passed * (1 + tolerance / 2), failed / (1 + tolerance / 2)
    return min(max(secant, low), high) if passed < secant < middle else middle
