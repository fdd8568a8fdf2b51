"""The one template of all attacks: methods search, the template refuses, keeps time, seeds, verifies and records."""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.attacks.search.evaluate import Evaluator, group_key, search_threat
from attnrobust.attacks.search.geometry import Geometry
from attnrobust.attacks.verification import MovedTokens, VerifiedPoint, verify
from attnrobust.errors import (
    AttnRobustError,
    InputError,
    UnsupportedModelError,
    UnsupportedThreatError,
    first_line,
    one_line,
)
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import MoveThreat
from attnrobust.tokens import PerturbedTokens, as_index, as_number, as_positive


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """What one input may cost.

    Args:
        restarts: Starting points of one input; all advance together.
        steps: Gradient steps of one round.
        rounds: Rounds of restarts; later ones start from what the first found, and only where the goal is not nearly
            linear at the scale of the attack.
        queries: Largest number of queries of one input, those of the verification included; None means no limit. One
            query is one evaluation of the network at one point, with or without its gradient, or one product with its
            derivative at the clean input; what is prepared there before the search (its output, the precision and
            memory of an evaluation) counts as one for whole networks and as none for layers. It is never exceeded: a
            search that cannot afford its next step ends, and about a third is kept for the verification.
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
            if value is None and name in ("queries", "seconds"):
                continue
            read = as_number if name == "seconds" else as_index
            number = read(f"attack budget: {name}", value)
            if not number > 0:
                raise InputError(f"attack budget: {name} must be positive; got {one_line(value)}")
            object.__setattr__(self, name, number)


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

    @property
    def limit(self) -> int | None:
        """Queries of one problem before its verification."""
        limit = self.budget.queries
        return None if limit is None else limit - min(VERIFICATION, math.ceil(limit / 3))

    def affordable(self, evaluator: Evaluator, rows: int) -> Bool[Tensor, "p"]:
        """Which of the evaluator's problems may still be evaluated at so many points."""
        spent = evaluator.spent + rows
        return torch.ones_like(spent, dtype=torch.bool) if self.limit is None else spent <= self.limit

    def part(self, evaluator: Evaluator, wanted: int, *, share: int) -> int:
        """How many of ``wanted`` queries fit into one ``share``-th of what is left for each problem."""
        if self.limit is None:
            return wanted
        return max(0, min(wanted, (self.limit - int(evaluator.spent.max())) // share))

    def generators(self) -> list[torch.Generator]:
        """One random stream per problem (on the CPU, so that devices agree)."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """What a method receives: problems to attack together, and everything that bounds the work on them.

    Args:
        problems: The questions.
        epsilon: Fixed budget of the adversary, or None for the minimal radius.
        seed: Seed of the run.
        budget: Cost limits, per input.
        deadline: ``time.perf_counter()`` value after which the method stops, or infinity.
    """

    problems: Sequence[Problem]
    epsilon: float | None
    seed: int
    budget: AttackBudget
    deadline: float = math.inf

    @property
    def out_of_time(self) -> bool:
        """Whether the wall time is used up."""
        return time.perf_counter() > self.deadline

    def seed_of(self, problem: Problem, attack: str) -> int:
        """Seed of one input: it depends on nothing but the run's seed, the problem and the attack."""
        return input_seed(self.seed, problem.digest, attack)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attempt:
    """What a method found for one problem.

    Args:
        point: Its best point, verified.
        queries: Forward evaluations, those of the verification included.
        atoms: The atoms of the point, where it has more of them than tokens or other masses.
        moving_radius: Radius of moving alone, or at a fixed epsilon the budget that moving alone used.
        failure: The status of a search that failed, in place of "not found"; None where it did not.
        note: What went wrong, or empty.
    """

    point: VerifiedPoint
    queries: int
    atoms: PerturbedTokens | None = None
    moving_radius: float = math.nan
    failure: Status | None = None
    note: str = ""


class AttackMethod(ABC):
    """An attack: it declares the threats that it searches, and finds points that the template records.

    Whatever a method proposes is verified by ``attacks.verification.verify``: put into the set, evaluated in float64 by
    the layer itself, and measured by the threat.
    """

    name: ClassVar[str]
    threats: ClassVar[tuple[type[Threat], ...]]

    def refuses(self, problem: Problem, epsilon: float | None) -> str | None:
        """Why this attack does not handle the problem; None if it does."""
        if not isinstance(problem.threat, self.threats):
            names = ", ".join(threat.__name__ for threat in self.threats)
            return f"it searches the threats {names}, not {problem.threat.key!r}"
        return self.refuses_more(problem, epsilon)

    def refuses_more(self, problem: Problem, epsilon: float | None) -> str | None:
        """Conditions beyond the declared threats; None where there are none."""
        return None

    def group_key(self, problem: Problem) -> Hashable | None:
        """Problems with equal keys are attacked together; None means alone."""
        return None

    @abstractmethod
    def search(self, work: Work) -> list[Attempt]:
        """The best verified point of every problem."""

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
            UnsupportedModelError: An operation of the network has no second derivative in torch.
        """
        start = time.perf_counter()
        for problem in problems:
            reason = self.refuses(problem, epsilon)
            if reason is not None:
                raise UnsupportedThreatError(f"attack {self.name!r}: {reason}")
        deadline = math.inf if budget.seconds is None else start + budget.seconds
        work = Work(problems=problems, epsilon=epsilon, seed=seed, budget=budget, deadline=deadline)
        with torch.no_grad(), twice_differentiable():
            attempts = self.search(work)
        share = (time.perf_counter() - start) / len(problems)
        return [
            _record(problem, self.name, attempt, work, seconds=share)
            for problem, attempt in zip(problems, attempts, strict=True)
        ]


class MovingAttack(AttackMethod):
    """An attack on token positions: subclasses propose perturbations and nothing else."""

    threats = (MoveThreat,)

    @abstractmethod
    def propose(self, search: Search) -> Float[Tensor, "p k n d"]:
        """Candidate perturbations of every problem; NaN entries are dropped by the verification."""

    def group_key(self, problem: Problem) -> Hashable | None:
        return group_key(problem)

    def search(self, work: Work) -> list[Attempt]:
        evaluator = Evaluator(work.problems, memory_bytes=work.budget.memory_bytes)
        search = Search(
            evaluator=evaluator,
            threat=search_threat(work.problems[0].moves),
            epsilon=work.epsilon,
            seeds=tuple(work.seed_of(p, self.name) for p in work.problems),
            budget=work.budget,
            deadline=work.deadline,
        )
        candidates = self.propose(search)
        spent = evaluator.queries.tolist()
        points = [
            verify(MovedTokens(p), c, epsilon=work.epsilon, limit=left(work.budget, queries))
            for p, c, queries in zip(work.problems, candidates, spent, strict=True)
        ]
        return [
            Attempt(point=point, queries=queries + point.queries, failure=cut_short(point, work.budget))
            for point, queries in zip(points, spent, strict=True)
        ]


def left(budget: AttackBudget, spent: int) -> int | None:
    """Queries that a budget still has; None means any number."""
    return None if budget.queries is None else max(0, budget.queries - spent)


def cut_short(point: VerifiedPoint, budget: AttackBudget) -> Status | None:
    """NOT_FOUND where no point was measured because the queries did not suffice; None elsewhere."""
    unmeasured = point.points is None and point.queries == 0
    return Status.NOT_FOUND if unmeasured and budget.queries is not None else None


VERIFICATION = 64
"""Queries that are kept for the verification at most; without a limit it takes 20 to 60."""


def input_seed(seed: int, problem_digest: str, attack: str) -> int:
    """Seed of one input: a hash of run seed, problem and attack, so it does not depend on batch or order."""
    sha = hashlib.sha256(f"{seed};{problem_digest};{attack}".encode()).digest()
    return int.from_bytes(sha[:8], "little") >> 1


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Name the cause where torch has no second derivative of an operation of the network (``torch.cdist``, say)."""
    try:
        yield
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"the network cannot be differentiated twice ({first_line(error)}); write its score with other operations"
        ) from error


def checked_epsilon(epsilon: float | None) -> float | None:
    """Refuse budgets that are not positive numbers."""
    return None if epsilon is None else as_positive("epsilon", epsilon)


def require_budget(budget: object) -> None:
    """Refuse what is no budget."""
    if not isinstance(budget, AttackBudget):
        raise InputError(f"the budget is {one_line(budget)}; give attnrobust.AttackBudget(restarts=8, steps=60)")


def _record(problem: Problem, attack: str, attempt: Attempt, work: Work, *, seconds: float) -> AttackResult:
    """The record of what was found."""
    point = attempt.point
    status = _status(point, timed_out=work.out_of_time)
    if attempt.failure is not None and status is not Status.FOUND:
        status = attempt.failure
    return AttackResult(
        problem=problem.digest,
        attack=attack,
        status=status,
        radius=point.radius,
        usage=point.usage,
        perturbed=point.perturbed,
        queries=attempt.queries,
        seconds=seconds,
        seed=work.seed,
        epsilon=work.epsilon,
        note=attempt.note,
        atoms=attempt.atoms if point.counts else None,
        moving_radius=attempt.moving_radius,
    )


def _status(point: VerifiedPoint, *, timed_out: bool) -> Status:
    if point.violates:
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
    """Group problems that the method attacks together, attack each group in batches, and keep the order.

    An input that fails becomes a row with status ERROR and a note; the others go on.
    """
    results: dict[int, AttackResult] = {}
    groups: dict[Hashable, list[int]] = {}
    for index, problem in enumerate(problems):
        key = method.group_key(problem)
        groups.setdefault(("alone", index) if key is None else key, []).append(index)
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
