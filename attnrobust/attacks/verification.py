"""How candidates become results: put into the set, brought to the boundary, re-evaluated and re-measured in float64."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.problem import Problem

RAY_TOLERANCE = 1e-9
"""A polished radius is within this share of a smaller one on its ray that does not violate the goal."""
RAY_STEPS = 60
ROUNDING_MARGIN = 1e-10
"""Polished points use the budget by this much more than needed, so that adding them to the tokens cannot undo it."""
NUDGES = (1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.0 + 1e-4)
"""Stretches tried in turn where rounding undoes a violation (a perturbation that is tiny against its tokens)."""
ADDITIONS = 8
"""Times that a perturbation is shortened until the moved tokens, rounded, lie inside of a fixed budget."""
TOKENS_TOGETHER = 2048
"""Tokens in one exact evaluation: scores of 512 tokens in 12 heads take 25 MB for each candidate."""
ROUNDING_QUERIES = 2
"""Evaluations that the rounding of a violation costs."""
GROWTH_LIMIT = 1e4
"""A proposal that does not violate the goal is stretched along its ray by at most this factor."""


def rows_together(points: Float[Tensor, "k m d"]) -> int:
    """Candidates that are evaluated in one call; by their own size alone, so that their numbers do not change."""
    return max(1, TOKENS_TOGETHER // int(points.shape[-2]))


class Reading(ABC):
    """One way of writing an input as atoms: where they are, what a move of them costs, what it does to the goal.

    Args:
        anchors: The atoms at rest (m, d).
        inside: Relative excess over a fixed epsilon that rounding of the distance explains.
    """

    anchors: Float[Tensor, "m d"]
    inside: float

    @abstractmethod
    def place(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k m d"]:
        """The atoms after a move."""

    @abstractmethod
    def project(self, delta: Float[Tensor, "k m d"], epsilon: float | None) -> Float[Tensor, "k m d"]:
        """The moves put into the threat's set of size epsilon; None means that of their own size."""

    @abstractmethod
    def distance(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        """The threat's distance of each move."""

    @abstractmethod
    def usage(self, points: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        """Used budget at each placement; a violation where it is >= 1."""

    def excess(self, points: Float[Tensor, "m d"]) -> float:
        """What rounding may have added to the used budget at one placement beyond what it allows for itself."""
        return 0.0


class MovedTokens(Reading):
    """The tokens of a problem about a threat on moved tokens.

    Args:
        problem: The question.
    """

    inside = 1e-12  # adding to the tokens rounds

    def __init__(self, problem: Problem) -> None:
        self.problem, self.anchors = problem, problem.clean.points

    def place(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k m d"]:
        return self.anchors + delta

    def project(self, delta: Float[Tensor, "k m d"], epsilon: float | None) -> Float[Tensor, "k m d"]:
        moves = self.problem.moves
        return moves.project(delta, moves.distance(delta) if epsilon is None else epsilon)

    def distance(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        return self.problem.moves.distance(delta)

    def usage(self, points: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        return torch.cat([self._usage(part) for part in points.split(rows_together(points))])

    def _usage(self, points: Tensor) -> Tensor:
        mass = None if self.problem.mass is None else self.problem.mass.expand(points.shape[0], -1)
        return self.problem.resolved.usage(self.problem.network(points, mass))

    def excess(self, points: Float[Tensor, "m d"]) -> float:
        return self.problem.usage_rounding(points)


@dataclass(frozen=True, eq=False)
class VerifiedPoint:
    """The best candidate, re-measured.

    Args:
        distance: Its distance.
        usage: Used budget there; NaN where no candidate was finite. Where it is >= 1 the rounding of the outputs has
            been taken away: it is at most the exact one.
        points: Where its atoms are; None where no candidate was finite.
        queries: Forward evaluations spent.
        epsilon: The fixed budget, or None.
    """

    distance: float
    usage: float
    points: Float[Tensor, "m d"] | None
    queries: int
    epsilon: float | None

    @property
    def violates(self) -> bool:
        """Whether the goal fails there."""
        return self.points is not None and self.usage >= 1.0

    @property
    def counts(self) -> bool:
        """Whether it is an answer: a violation, or anything finite at a fixed epsilon."""
        return self.violates or (self.points is not None and self.epsilon is not None)

    @property
    def radius(self) -> float:
        """Its distance; infinity where it is no answer."""
        return self.distance if self.counts else math.inf

    @property
    def perturbed(self) -> Float[Tensor, "m d"] | None:
        """Its atoms; None where it is no answer."""
        return self.points if self.counts else None

    @property
    def rank(self) -> float:
        """Smaller is better: the radius, or minus the used budget at a fixed epsilon."""
        if self.epsilon is None:
            return self.radius
        return math.inf if math.isnan(self.usage) else -self.usage


def nothing(epsilon: float | None, queries: int = 0) -> VerifiedPoint:
    """No candidate was finite."""
    return VerifiedPoint(math.inf, math.nan, None, queries, epsilon)


def best_of(points: Iterable[VerifiedPoint]) -> VerifiedPoint | None:
    """The best of several points, the first one of equals."""
    return min(points, key=lambda point: point.rank, default=None)


def verify(
    reading: Reading, candidates: Float[Tensor, "k m d"], *, epsilon: float | None, limit: int | None = None
) -> VerifiedPoint:
    """Project, polish, re-evaluate and re-measure candidates; the best one stays.

    Args:
        reading: The atoms and what is asked of them.
        candidates: Proposed moves, any number, NaN allowed (dropped).
        epsilon: Fixed budget (largest usage wins), or None (smallest radius with usage >= 1 wins).
        limit: Largest number of evaluations; None means no limit. With few, the first candidates are measured, and
            rays end farther from the boundary.

    Returns:
        The best point; its distance and usage belong to exactly the atoms in ``points``.
    """
    candidates = candidates[torch.isfinite(candidates).flatten(1).all(dim=1)]
    if limit is not None:
        candidates = candidates[: max(0, limit - ROUNDING_QUERIES)]
    if candidates.shape[0] == 0:
        return nothing(epsilon)
    projected = reading.project(candidates, epsilon)
    if epsilon is not None:
        return _measure(reading, projected, epsilon=epsilon, queries=0)
    measured = projected.shape[0] + ROUNDING_QUERIES
    room = None if limit is None else limit - measured
    projected, queries = shrink_to_boundary(lambda delta: reading.usage(reading.place(delta)), projected, limit=room)
    point = _measure(reading, projected, epsilon=None, queries=queries)
    for nudge in NUDGES[1:]:
        if point.violates or not point.usage > 1.0 - 1e-3 or (limit is not None and point.queries + measured > limit):
            break
        point = _measure(reading, projected * nudge, epsilon=None, queries=point.queries)
    return point


def _measure(reading: Reading, delta: Tensor, *, epsilon: float | None, queries: int) -> VerifiedPoint:
    """Evaluate what is handed out (rest + delta in float64) and measure delta back from it."""
    if epsilon is not None:
        delta = _inside_once_added(reading, delta, epsilon)
    points = reading.place(delta)
    usage, distance = reading.usage(points), reading.distance(points - reading.anchors)
    queries += points.shape[0]
    good = torch.isfinite(usage) & torch.isfinite(distance)
    if epsilon is not None:
        good &= distance <= epsilon * (1 + reading.inside)
    if not bool(good.any()):
        return nothing(epsilon, queries)
    violating = torch.where(good & (usage >= 1.0), distance, math.inf)
    best = int(violating.argmin())
    if epsilon is not None or math.isinf(float(violating[best])):
        best = int(torch.where(good, usage, -math.inf).argmax())
    used = float(usage[best])
    if used >= 1.0:  # a move to where the layer rounds more than at the clean input must win by that, too
        used -= reading.excess(points[best])
        queries += ROUNDING_QUERIES
    return VerifiedPoint(float(distance[best]), used, points[best].clone(), queries, epsilon)


def _inside_once_added(reading: Reading, delta: Tensor, epsilon: float) -> Tensor:
    """Shorten where needed: adding a small move to large tokens rounds each entry, by more than the budget allows."""
    delta = _strictly_inside(reading, reading.place(delta) - reading.anchors, epsilon)
    share = torch.ones_like(delta[:, 0, 0])
    for step in range(ADDITIONS):
        over = reading.distance(reading.place(delta * share[:, None, None]) - reading.anchors) / epsilon
        outside = (over > 1.0 + reading.inside) & torch.isfinite(over)
        if not bool(outside.any()):
            break
        # A little shorter may round to the same tokens again, so each round goes further.
        share = torch.where(outside, share * (1.0 - 2.0**step * (over - 1.0)).clamp_min(0.25), share)
    return delta * share[:, None, None]


def _strictly_inside(reading: Reading, delta: Tensor, epsilon: float) -> Tensor:
    over = reading.distance(delta) / epsilon
    factor = torch.where((over > 1.0) & torch.isfinite(over), (1.0 - 4e-16) / over, torch.ones_like(over))
    return delta * factor[:, None, None]


def shrink_to_boundary(
    usage: Callable[[Float[Tensor, "j n d"]], Float[Tensor, "j"]],
    delta: Float[Tensor, "k n d"],
    *,
    limit: int | None = None,
) -> tuple[Float[Tensor, "k n d"], int]:
    """Scale each perturbation to a point with usage >= 1 that is as near as its ray allows.

    Starts where the proposal is; stretches it where it does not violate the goal; then a bracketing secant
    between a scale that violates and one that does not. Rays are independent.

    Args:
        usage: Used budget of moved tokens; a violation where it is >= 1.
        delta: One perturbation per ray.
        limit: Largest number of evaluations; None means no limit. Where it does not reach for all rays, the shortest
            go on.

    Returns:
        The scaled perturbations (unchanged where no violation was met) and the forward evaluations spent.
    """
    k = delta.shape[0]
    low, high = delta.new_zeros(k), delta.new_full((k,), math.inf)
    low_usage, high_usage = delta.new_zeros(k), delta.new_full((k,), math.inf)
    scale = delta.new_ones(k)
    alive = torch.ones(k, dtype=torch.bool, device=delta.device)
    queries, target = 0, 1.0 + ROUNDING_MARGIN
    length = torch.linalg.vector_norm(delta, dim=(-2, -1))
    for step in range(RAY_STEPS):
        index = alive.nonzero().flatten()
        if limit is not None:
            index = index[(scale * length)[index].argsort(stable=True)[: max(0, limit - queries)]]
            alive = torch.zeros_like(alive)
            alive[index] = True
            if index.numel() == 0:
                break
        value = delta.new_full((k,), math.nan)
        value[index] = usage(delta[index] * scale[index, None, None])
        queries += int(index.numel())
        finite = torch.isfinite(value)
        hit, miss = alive & finite & (value >= target), alive & finite & (value < target)
        high, high_usage = torch.where(hit, scale, high), torch.where(hit, value, high_usage)
        low, low_usage = torch.where(miss, scale, low), torch.where(miss, value, low_usage)
        open_end = torch.isinf(high)
        closed = torch.isfinite(high) & ((high - low) <= RAY_TOLERANCE * high)
        alive = alive & finite & ~closed & (low < GROWTH_LIMIT)
        if not bool(alive.any()):
            break
        stretched = low * (1.02 / low_usage.clamp_min(1e-6)).clamp(1.02, 4.0)
        fraction = (target - low_usage) / (high_usage - low_usage).clamp_min(1e-300)
        middle = 0.5 * (low + high)
        edge = 0.4 * RAY_TOLERANCE * high
        # The secant aims just above the crossing; every third step halves, so a curved ray converges as well.
        secant = low + (high - low) * fraction.clamp(0.0, 1.0) + edge
        inner = middle if step % 3 == 2 else torch.minimum(torch.maximum(secant, low + edge), high - edge)
        scale = torch.where(open_end, stretched, torch.where(torch.isfinite(inner), inner, middle))
    return delta * torch.where(torch.isinf(high), torch.ones_like(high), high)[:, None, None], queries
