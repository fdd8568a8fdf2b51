"""The one template of all attacks: drivers propose, the template projects, re-evaluates, re-measures and records."""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.attacks.search.evaluate import Evaluator, group_key, search_threat
from attnrobust.attacks.search.geometry import Geometry
from attnrobust.errors import AttnRobustError, InputError, UnsupportedThreatError
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.moves import Threat

RAY_TOLERANCE = 1e-9
"""A polished radius is within this share of a smaller one on its ray that does not violate the goal."""
RAY_STEPS = 60
ROUNDING_MARGIN = 1e-10
"""Polished points use the budget by this much more than needed, so that adding them to the tokens cannot undo it."""
NUDGES = (1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.0 + 1e-4)
"""Stretches tried in turn where rounding undoes a violation (a perturbation that is tiny against its tokens)."""
ADDITIONS = 8
"""Times that a perturbation is shortened until the moved tokens, rounded, lie inside of a fixed budget."""
GROWTH_LIMIT = 1e4
"""A proposal that does not violate the goal is stretched along its ray by at most this factor."""


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """What one input may cost.

    Args:
        restarts: Starting points of one input; all advance together.
        steps: Gradient steps of one round.
        rounds: Rounds of restarts; later ones start from what the first found, and only where the goal is not nearly
            linear at the scale of the attack.
        queries: Largest number of forward evaluations of one input; None means no limit. It is checked between steps.
        seconds: Wall time of one batch of inputs; None means no limit. A run that it cuts short is not reproducible.
        memory_bytes: Bytes that score-sized arrays (batch x heads x n x n) may take; larger batches are cut in chunks.
    """

    restarts: int = 8
    steps: int = 60
    rounds: int = 3
    queries: int | None = None
    seconds: float | None = None
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("restarts", "steps", "rounds", "memory_bytes", "queries", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"attack budget: {name} must be positive; got {value}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Search:
    """What a driver receives: the stacked problems and everything that bounds its work.

    Args:
        evaluator: Batched values and gradients; counts queries.
        threat: The common geometry; which tokens move is the evaluator's ``movable``.
        epsilon: Fixed budget of the adversary, or None for the minimal-radius mode.
        seeds: One seed per problem, independent of the other problems.
        budget: Restarts, steps, memory.
        deadline: ``time.perf_counter()`` value after which the driver stops, or infinity.
    """

    evaluator: Evaluator
    threat: Geometry
    epsilon: float | None
    seeds: tuple[int, ...]
    budget: AttackBudget
    deadline: float = math.inf

    @property
    def out_of_time(self) -> bool:
        """Whether the wall time is used up."""
        return time.perf_counter() > self.deadline

    def affordable(self, evaluator: Evaluator, rows: int) -> Bool[Tensor, "p"]:
        """Which of the evaluator's problems may still be evaluated at so many points."""
        limit = self.budget.queries
        spent = evaluator.queries[evaluator.index] + rows
        return torch.ones_like(spent, dtype=torch.bool) if limit is None else spent <= limit

    def generators(self) -> list[torch.Generator]:
        """One random stream per problem (on the CPU, so that devices agree)."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


class AttackMethod(ABC):
    """An attack on token positions: subclasses propose perturbations and nothing else."""

    name: ClassVar[str]

    def refuses(self, problem: Problem, epsilon: float | None) -> str | None:
        """Why this attack does not handle the problem; None if it does."""
        return None

    @abstractmethod
    def propose(self, search: Search) -> Float[Tensor, "p k n d"]:
        """Candidate perturbations of every problem; NaN entries are dropped by the template."""

    def run(
        self, problems: Sequence[Problem], *, epsilon: float | None, seed: int, budget: AttackBudget
    ) -> list[AttackResult]:
        """Attack problems of one group together and verify what is proposed.

        Args:
            problems: Problems with one ``group_key``.
            epsilon: Fixed budget, or None for the minimal radius.
            seed: Seed of the run.
            budget: Cost limits.

        Returns:
            One result per problem; every FOUND was evaluated in float64 and its distance measured by the threat.

        Raises:
            UnsupportedThreatError: The attack refuses the problems.
        """
        start = time.perf_counter()
        for problem in problems:
            reason = self.refuses(problem, epsilon)
            if reason is not None:
                raise UnsupportedThreatError(f"attack {self.name!r}: {reason}")
        evaluator = Evaluator(problems, memory_bytes=budget.memory_bytes)
        search = Search(
            evaluator=evaluator,
            threat=search_threat(problems[0]),
            epsilon=epsilon,
            seeds=tuple(input_seed(seed, p.digest, self.name) for p in problems),
            budget=budget,
            deadline=math.inf if budget.seconds is None else start + budget.seconds,
        )
        with torch.no_grad():
            candidates = self.propose(search)
            found = [verify(p, c, epsilon=epsilon) for p, c in zip(problems, candidates, strict=True)]
        share = (time.perf_counter() - start) / len(problems)
        return [
            build_result(
                problem, self.name, point, queries=queries, seconds=share, seed=seed, epsilon=epsilon,
                timed_out=search.out_of_time,
            )
            for problem, point, queries in zip(problems, found, evaluator.queries.tolist(), strict=True)
        ]  # fmt: skip


def input_seed(seed: int, problem_digest: str, attack: str) -> int:
    """Seed of one input: a hash of run seed, problem and attack, so it does not depend on batch or order."""
    sha = hashlib.sha256(f"{seed};{problem_digest};{attack}".encode()).digest()
    return int.from_bytes(sha[:8], "little") >> 1


def checked_epsilon(epsilon: float | None) -> float | None:
    """Refuse budgets that are not positive numbers."""
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"epsilon must be a positive number; got {epsilon}")
    return epsilon


# ---- verification ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VerifiedPoint:
    """The best candidate of one problem, re-measured; usage is NaN where no candidate was finite.

    A usage >= 1 has the rounding of the outputs taken away already: it is at most the exact one.
    """

    radius: float
    usage: float
    perturbed: Float[Tensor, "n d"] | None
    queries: int


def verify(problem: Problem, candidates: Float[Tensor, "k n d"], *, epsilon: float | None) -> VerifiedPoint:
    """Project, polish, re-evaluate and re-measure the candidates of one problem; the best one stays.

    Args:
        problem: The question.
        candidates: Proposed perturbations, any number, NaN allowed (dropped).
        epsilon: Fixed budget (largest usage wins), or None (smallest radius with usage >= 1 wins).

    Returns:
        The best point; its radius and usage belong to exactly the tokens in ``perturbed``.
    """
    finite = torch.isfinite(candidates).flatten(1).all(dim=1)
    if not bool(finite.any()):
        return VerifiedPoint(math.inf, math.nan, None, 0)
    candidates = candidates[finite]
    if epsilon is None:
        projected = problem.threat.project(candidates, problem.threat.distance(candidates))
        projected, queries = shrink_to_boundary(problem.usage, projected)
    else:
        projected, queries = problem.threat.project(candidates, epsilon), 0
    if epsilon is not None:
        return _measure(problem, projected, epsilon=epsilon, queries=queries)
    point = _measure(problem, projected, epsilon=None, queries=queries)
    for nudge in NUDGES[1:]:
        if point.perturbed is not None or not point.usage > 1.0 - 1e-3:
            break
        point = _measure(problem, projected * nudge, epsilon=None, queries=point.queries)
    return point


def _measure(problem: Problem, delta: Tensor, *, epsilon: float | None, queries: int) -> VerifiedPoint:
    """Evaluate what is handed out (clean + delta in float64) and measure delta back from it."""
    if epsilon is not None:
        delta = _inside_once_added(problem, delta, epsilon)
    perturbed = problem.clean.points + delta
    delta = perturbed - problem.clean.points
    usage = problem.resolved.usage(problem.network(perturbed, _expand(problem.mass, perturbed.shape[0])))
    distance = problem.threat.distance(delta)
    queries += perturbed.shape[0]
    good = torch.isfinite(usage) & torch.isfinite(distance)
    if epsilon is not None:
        good &= distance <= epsilon * (1 + 1e-12)  # adding to the tokens rounds: 1e-12 covers it
    if not bool(good.any()):
        return VerifiedPoint(math.inf, math.nan, None, queries)
    violating = torch.where(good & (usage >= 1.0), distance, math.inf)
    best = int(violating.argmin())
    if epsilon is not None or math.isinf(float(violating[best])):
        best = int(torch.where(good, usage, -math.inf).argmax())
        if epsilon is None:
            return VerifiedPoint(math.inf, float(usage[best]), None, queries)
    used = float(usage[best])
    if used >= 1.0:  # a move to where the layer rounds more than at the clean input must win by that, too
        used -= problem.usage_rounding(perturbed[best])
        queries += 2
        if epsilon is None and used < 1.0:
            return VerifiedPoint(math.inf, used, None, queries)
    return VerifiedPoint(float(distance[best]), used, perturbed[best].clone(), queries)


def shrink_to_boundary(
    usage: Callable[[Float[Tensor, "j n d"]], Float[Tensor, "j"]], delta: Float[Tensor, "k n d"]
) -> tuple[Float[Tensor, "k n d"], int]:
    """Scale each perturbation to a point with usage >= 1 that is as near as its ray allows.

    Starts where the proposal is; stretches it where it does not violate the goal; then a bracketing secant
    between a scale that violates and one that does not. Rays are independent.

    Args:
        usage: Used budget of moved tokens; a violation where it is >= 1.
        delta: One perturbation per ray.

    Returns:
        The scaled perturbations (unchanged where no violation was met) and the forward evaluations spent.
    """
    k = delta.shape[0]
    low, high = delta.new_zeros(k), delta.new_full((k,), math.inf)
    low_usage, high_usage = delta.new_zeros(k), delta.new_full((k,), math.inf)
    scale = delta.new_ones(k)
    alive = torch.ones(k, dtype=torch.bool, device=delta.device)
    queries, target = 0, 1.0 + ROUNDING_MARGIN
    for step in range(RAY_STEPS):
        index = alive.nonzero().flatten()
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


def build_result(
    problem: Problem,
    attack: str,
    point: VerifiedPoint,
    *,
    queries: int,
    seconds: float,
    seed: int,
    epsilon: float | None,
    timed_out: bool,
) -> AttackResult:
    """The record of a verified point."""
    return AttackResult(
        problem=problem.digest,
        attack=attack,
        status=_status(point, timed_out=timed_out),
        radius=point.radius,
        usage=point.usage,
        perturbed=point.perturbed,
        queries=queries + point.queries,
        seconds=seconds,
        seed=seed,
        epsilon=epsilon,
    )


def _inside_once_added(problem: Problem, delta: Tensor, epsilon: float) -> Tensor:
    """Shorten where needed: adding a small move to large tokens rounds each entry, by more than 1e-12 of the budget."""
    clean = problem.clean.points
    delta = _strictly_inside(problem.threat, clean + delta - clean, epsilon)
    share = torch.ones_like(delta[:, 0, 0])
    for step in range(ADDITIONS):
        over = problem.threat.distance(clean + delta * share[:, None, None] - clean) / epsilon
        beyond = (over > 1.0 + 1e-12) & torch.isfinite(over)
        if not bool(beyond.any()):
            break
        # A little shorter may round to the same tokens again, so each round goes further.
        share = torch.where(beyond, share * (1.0 - 2.0**step * (over - 1.0)).clamp_min(0.25), share)
    return delta * share[:, None, None]


def _strictly_inside(threat: Threat, delta: Tensor, epsilon: float) -> Tensor:
    over = threat.distance(delta) / epsilon
    factor = torch.where((over > 1.0) & torch.isfinite(over), (1.0 - 4e-16) / over, torch.ones_like(over))
    return delta * factor[:, None, None]


def _expand(mass: Tensor | None, rows: int) -> Tensor | None:
    return None if mass is None else mass.expand(rows, -1)


def _status(point: VerifiedPoint, *, timed_out: bool) -> Status:
    if point.perturbed is not None and point.usage >= 1.0:
        return Status.FOUND
    if math.isnan(point.usage):
        return Status.NAN
    return Status.TIMEOUT if timed_out else Status.NOT_FOUND


# ---- many problems -----------------------------------------------------------------------------------------------


def run_many(
    method: AttackMethod,
    problems: Sequence[Problem],
    *,
    epsilon: float | None,
    seed: int,
    budget: AttackBudget,
    batch_size: int,
) -> list[AttackResult]:
    """Group problems of equal shape, attack each group in batches, and keep the order.

    An input that fails becomes a row with status ERROR and a note; the others go on.
    """
    results: dict[int, AttackResult] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, problem in enumerate(problems):
        groups.setdefault(group_key(problem), []).append(index)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            rows = _run_or_split(method, [problems[i] for i in part], epsilon=epsilon, seed=seed, budget=budget)
            results.update(zip(part, rows, strict=True))
    return [results[i] for i in range(len(problems))]


def _run_or_split(
    method: AttackMethod, problems: list[Problem], *, epsilon: float | None, seed: int, budget: AttackBudget
) -> list[AttackResult]:
    try:
        return method.run(problems, epsilon=epsilon, seed=seed, budget=budget)
    except (AttnRobustError, ArithmeticError, RuntimeError, ValueError) as error:
        if len(problems) == 1:
            return [_failed(method, problems[0], error, epsilon=epsilon, seed=seed)]
    singles = ([problem] for problem in problems)
    return [row for one in singles for row in _run_or_split(method, one, epsilon=epsilon, seed=seed, budget=budget)]


def _failed(
    method: AttackMethod, problem: Problem, error: Exception, *, epsilon: float | None, seed: int
) -> AttackResult:
    return AttackResult(
        problem=problem.digest,
        attack=method.name,
        status=Status.ERROR,
        radius=math.inf,
        usage=math.nan,
        perturbed=None,
        queries=0,
        seconds=0.0,
        seed=seed,
        epsilon=epsilon,
        note=f"{type(error).__name__}: {error}",
    )
