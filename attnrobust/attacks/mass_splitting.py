"""The mass-splitting attack: a token's mass divides among displaced children."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import expanded_problem, goal_row
from attnrobust.attacks.measures.goal import MeasureReader, query_sensitivity
from attnrobust.attacks.measures.masses import refine_masses
from attnrobust.attacks.measures.result import MeasureAttackResult, measure_digest
from attnrobust.attacks.measures.split_starts import far_starts, kicked_starts, near_starts
from attnrobust.attacks.method import (
    AttackBudget,
    Search,
    checked_epsilon,
    input_seed,
    shrink_to_boundary,
)
from attnrobust.attacks.search.evaluate import Evaluator, into_ball
from attnrobust.attacks.search.geometry import Geometry, SumBall
from attnrobust.attacks.search.projected_gradient import search_rows
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.measures import CouplingBall, MeasureThreat, PerturbedTokens
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall

NAME = "mass-splitting"
NEAR_FRACTIONS = (0.5, 0.1)
JOURNEYS = (2.0, 1.4, 1.2, 1.0, 0.7, 0.35)
"""Default shares of a token's mass that leave it: equal halves, a tenth, and the masses that can afford to travel these
multiples of the tokens' spread."""
SMALLEST_FRACTION = 1e-12
WORTH = 0.02
"""Another round follows where the last one improved by more than this share."""
MAX_SPLIT = 8
"""Tokens that are split when none are named: those whose own query reacts most."""
REFINED = 4
"""Best configurations whose masses and positions are refined together."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """One way of writing the input as atoms: the first n are the tokens, the others their second children.

    Args:
        problem: The expanded question.
        parent: Parent of each atom, (m,).
        mass: Mass of each atom, (m,).
        scale: Atom moves are the search's variables times these, (m,): the coupling cost becomes a plain norm.
    """

    problem: Problem
    parent: Int[Tensor, "m"]
    mass: Float[Tensor, "m"]
    scale: Float[Tensor, "m"]


def split_attack(
    problem: Problem,
    *,
    threat: MeasureThreat | None = None,
    epsilon: float | None = None,
    tokens: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    domain_radius: float | None = None,
    seed: int = 0,
    budget: AttackBudget | None = None,
) -> MeasureAttackResult:
    r"""Move and split tokens: the nearest measure found that violates the goal, or the strongest within epsilon.

    First the tokens move alone (masses kept together); from where that stalls, tokens split in two, in halves and in
    small shares, and masses and positions are refined together. Goals are read from the atoms: the mass-weighted mean,
    the row's first atom, or, for a displacement of all rows, ``sqrt(n) W_2`` between the output measures by exact
    transport (for n equal masses that moved a little this is the Frobenius norm).

    Args:
        problem: The question; of its threat only the set of movable tokens is used.
        threat: Budget of the adversary, in units of W_p; None means the W_2 coupling cost.
        epsilon: Fixed budget, or None for the minimal radius.
        tokens: Tokens that may split; None means all, or the most sensitive ones of a long input. The token whose row
            the goal reads never splits.
        fractions: Shares of its mass that a token's second child gets, each in (0, 1); None means halves, a tenth, and
            the small shares that can afford to travel about as far as the tokens are apart.
        domain_radius: Every atom stays in the ball of this radius around 0 (which must hold the clean tokens); None
            means that of the threat, or all of space, where a tiny mass may travel so far that it takes the attention
            of the other tokens.
        seed: Seed of the run.
        budget: What each of the searches may cost.

    Returns:
        The verified atoms; ``radius`` is the exact distance of the threat, ``gain`` compares with moving alone.

    Raises:
        InputError: Fractions outside (0, 1), tokens that do not exist, epsilon that is not positive, a clean token
            outside of the domain.
        UnsupportedThreatError: A problem whose threat allows one token only ("any token").
    """
    start = time.perf_counter()
    epsilon = checked_epsilon(epsilon)
    budget = budget or AttackBudget()
    attack = _SplitAttack(problem, threat or CouplingBall(2), epsilon, domain_radius, seed, budget)
    if fractions is not None:
        attack.check_fractions(fractions)
    with torch.no_grad():
        moving = attack.best_of(attack.move())
        candidates = [moving] if moving is not None else []
        chosen = attack.tokens_to_split(tokens)
        best = moving
        for _ in range(budget.rounds if chosen else 0):
            before = attack.rank(best) if best is not None else math.inf
            shares = attack.default_fractions(best) if fractions is None else tuple(fractions)
            candidates += attack.split(chosen, shares, moving, best)
            candidates += attack.refine(candidates)
            best = attack.best_of_points(candidates)
            if fractions is not None or not attack.improved(before, best):
                break
        best = attack.best_of_points(candidates)
    return attack.result(best, moving, seconds=time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class _Point:
    """Verified atoms."""

    atoms: PerturbedTokens
    radius: float
    usage: float


class _SplitAttack:
    """One run: what is common to its searches."""

    def __init__(
        self,
        problem: Problem,
        threat: MeasureThreat,
        epsilon: float | None,
        domain_radius: float | None,
        seed: int,
        budget: AttackBudget,
    ) -> None:
        if not isinstance(problem.threat, FrobeniusBall | PerTokenBall):
            raise UnsupportedThreatError(
                f"mass splitting does not handle the threat {problem.threat.key!r}: it moves every token it may; "
                "name the tokens with tokens:I,J"
            )
        if domain_radius is None:
            domain_radius = threat.domain_radius
        threat = threat.within(domain_radius)
        self.problem, self.threat, self.epsilon, self.budget = problem, threat, epsilon, budget
        if domain_radius is not None:
            longest = float(torch.linalg.vector_norm(problem.clean.points, dim=-1).max())
            if not longest <= domain_radius * (1 + 1e-12):
                raise InputError(
                    f"a clean token has norm {longest:.6g}, outside of the domain radius {domain_radius:.6g}"
                )
        self.domain_radius = domain_radius
        self.digest = measure_digest(problem, threat.key)
        self.seed, self.input_seed = seed, input_seed(seed, self.digest, NAME)
        self.row = goal_row(problem)
        self.queries = 0
        self.start = time.perf_counter()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @staticmethod
    def check_fractions(fractions: Sequence[float]) -> None:
        """Refuse shares that are not shares."""
        bad = [f for f in fractions if not 0.0 < f < 1.0]
        if bad or not fractions:
            raise InputError(f"mass fractions must be in (0, 1); got {bad[0] if bad else 'none'}")

    def default_fractions(self, moving: _Point | None) -> tuple[float, ...]:
        """Halves, a tenth, and what the budget can send on long journeys: ``mass |journey|^p = budget^p``."""
        clean, order = self.problem.clean, float(self.threat.order)
        if math.isinf(order):
            return (*NEAR_FRACTIONS, 1e-2, 1e-3)
        budget = self.epsilon if self.epsilon is not None else moving.radius if moving is not None else math.inf
        center = clean.mass @ clean.points
        spread = float(torch.linalg.vector_norm(clean.points - center, dim=-1).max())
        if not (math.isfinite(budget) and spread > 0):
            return NEAR_FRACTIONS
        far = [(budget / (spread * journey)) ** order * clean.n for journey in JOURNEYS]
        return (*NEAR_FRACTIONS, *(f for f in far if SMALLEST_FRACTION < f < NEAR_FRACTIONS[-1]))

    def tokens_to_split(self, tokens: Sequence[int] | None) -> list[int]:
        """The tokens that split, most sensitive first."""
        n = self.problem.clean.n
        movable = self.problem.threat.movable(n)
        if tokens is not None:
            missing = [t for t in tokens if not 0 <= t < n or not bool(movable[t])]
            if missing:
                raise InputError(f"token {missing[0]} does not exist or may not move; it cannot split")
        allowed = [i for i in (range(n) if tokens is None else tokens) if bool(movable[i]) and i != self.row]
        if len(allowed) <= MAX_SPLIT or tokens is not None:
            return allowed
        order = query_sensitivity(self.problem).argsort(descending=True).tolist()
        return [i for i in order if i in set(allowed)][:MAX_SPLIT]

    def write(self, chosen: Sequence[int], fraction: float) -> Split:
        """The input as atoms: every token, and a second child for the chosen ones."""
        clean = self.problem.clean
        n, device = clean.n, clean.points.device
        parent = torch.cat(
            [torch.arange(n, device=device), torch.tensor(list(chosen), dtype=torch.int64, device=device)]
        )
        mass = clean.mass[parent].clone()
        mass[n:] *= fraction
        mass[list(chosen)] *= 1.0 - fraction
        return self.split_of(parent, mass)

    def split_of(self, parent: Tensor, mass: Tensor) -> Split:
        """Atoms with given masses as a search problem whose norm is the coupling cost."""
        movable = self.problem.threat.movable(self.problem.clean.n).to(parent.device)[parent]
        expanded = expanded_problem(
            self.problem,
            parent,
            mass,
            row_scale=(mass * self.problem.clean.n).sqrt(),
            movable=tuple(movable.nonzero().flatten().tolist()),
        )
        power = {1.0: -1.0, 2.0: -0.5}.get(float(self.threat.order), 0.0)
        return Split(problem=expanded, parent=parent, mass=mass, scale=mass**power)

    @property
    def geometry(self) -> Geometry:
        """The plain norm that the coupling cost becomes."""
        if math.isinf(self.threat.order):
            return PerTokenBall()
        return FrobeniusBall() if self.threat.order == 2 else SumBall()

    def search(self, splits: Sequence[Split]) -> Search:
        """A search over ways of writing the input; all have the same number of atoms."""
        evaluator = Evaluator(
            [s.problem for s in splits],
            memory_bytes=self.budget.memory_bytes,
            scale=torch.stack([s.scale for s in splits]),
            domain_radius=self.domain_radius,
        )
        seconds = self.budget.seconds
        return Search(
            evaluator=evaluator,
            threat=self.geometry,
            epsilon=self.epsilon,
            seeds=tuple(input_seed(self.input_seed, str(i), NAME) for i in range(len(splits))),
            budget=self.budget,
            deadline=math.inf if seconds is None else self.start + seconds,
        )

    # ---- searches --------------------------------------------------------------------------------------------------

    def move(self) -> list[PerturbedTokens]:
        """Moving alone, measured by the same budget."""
        split = self.write((), 0.5)
        search = self.search([split])
        moved = TokenMoving().propose(search)[0]
        self.queries += int(search.evaluator.queries.sum())
        return self.atoms(split, moved)

    def split(
        self, chosen: Sequence[int], fractions: Sequence[float], moving: _Point | None, best: _Point | None
    ) -> list[_Point]:
        """Search from where moving stalled (large shares) and from far journeys (small ones), shares side by side.

        Where the best point is already split, only journeys around it are searched again.
        """
        again = best is not None and best.atoms.points.shape[0] == self.problem.clean.n + len(chosen)
        large = [] if again else [f for f in fractions if f >= NEAR_FRACTIONS[-1]]
        small = [f for f in fractions if f < NEAR_FRACTIONS[-1]]
        found: list[_Point | None] = []
        for shares, kind in ((large, near_starts), (small, far_starts)):
            if not shares or self.out_of_time:
                continue
            splits = [self.write(chosen, f) for f in shares]
            search = self.search(splits)
            if again and best is not None:
                start = kicked_starts(search, best.atoms.displacement(self.problem.clean))
            else:
                moved = None if moving is None else moving.atoms
                start = kind(search, self.problem.clean, splits[0].parent, moving=moved)
            finish = search_rows(search, search.evaluator, start, steps=self.budget.steps)
            self.queries += int(search.evaluator.queries.sum())
            found += [self.best_of(self.atoms(split, x)) for split, x in zip(splits, finish.points, strict=True)]
        return [point for point in found if point is not None]

    def refine(self, points: Sequence[_Point]) -> list[_Point]:
        """Positions and masses together, from the best configurations."""
        refined: list[_Point | None] = []
        for point in sorted(points, key=self.rank)[:REFINED]:
            if self.out_of_time:
                break
            better, queries = refine_masses(
                self.problem,
                point.atoms,
                order=self.threat.order,
                steps=self.budget.steps,
                domain_radius=self.domain_radius,
            )
            self.queries += queries
            refined.append(self.best_of(better))
        return [point for point in refined if point is not None]

    @property
    def out_of_time(self) -> bool:
        """Whether the wall time is used up."""
        return self.budget.seconds is not None and time.perf_counter() > self.start + self.budget.seconds

    def improved(self, before: float, best: _Point | None) -> bool:
        """Whether a round was worth another one."""
        return best is not None and self.rank(best) < before - WORTH * abs(before)

    def atoms(self, split: Split, variables: Float[Tensor, "k m d"]) -> list[PerturbedTokens]:
        """Search points as atoms; what is not finite is dropped."""
        finite = variables[torch.isfinite(variables).flatten(1).all(dim=1)]
        anchors = self.problem.clean.points[split.parent]
        placed = into_ball(anchors + finite * split.scale[:, None], self.domain_radius)
        return [PerturbedTokens(points, split.mass, split.parent) for points in placed]

    # ---- verification ----------------------------------------------------------------------------------------------

    def rank(self, point: _Point) -> float:
        """Smaller is better."""
        if self.epsilon is not None:
            return -point.usage
        return point.radius if point.usage >= 1.0 else math.inf

    def best_of_points(self, points: Sequence[_Point]) -> _Point | None:
        """The best verified point; without epsilon it violates the goal."""
        best = min(points, key=self.rank, default=None)
        return best if best is not None and (self.epsilon is not None or best.usage >= 1.0) else None

    def best_of(self, candidates: Sequence[PerturbedTokens]) -> _Point | None:
        """Polish, re-evaluate and re-measure candidates; the best one, or None."""
        points = [p for p in (self.verify(atoms) for atoms in candidates) if p is not None]
        return min(points, key=self.rank, default=None)

    def verify(self, atoms: PerturbedTokens) -> _Point | None:
        """Exact budget and exact output distance of one candidate."""
        clean = self.problem.clean
        if self.epsilon is None:
            anchors = clean.points[atoms.parent]
            reader = MeasureReader(self.problem, atoms.mass, atoms.parent)

            def usage(moves: Tensor) -> Tensor:
                return reader.usage(into_ball(anchors + moves, self.domain_radius))

            moves, queries = shrink_to_boundary(usage, atoms.displacement(clean)[None])
            atoms = replace(atoms, points=into_ball(anchors + moves[0], self.domain_radius))
            self.queries += queries
        elif self.threat.distance(clean, atoms) > self.epsilon:
            atoms = self.threat.project(clean, atoms, self.epsilon)
        self.queries += 1
        used = float(MeasureReader(self.problem, atoms.mass, atoms.parent).usage(atoms.points[None])[0])
        radius = self.threat.distance(clean, atoms)
        if not (math.isfinite(used) and math.isfinite(radius)):
            return None
        if self.epsilon is not None and radius > self.epsilon * (1 + 1e-9):
            return None
        return _Point(atoms, radius, used)

    def result(self, best: _Point | None, moving: _Point | None, *, seconds: float) -> MeasureAttackResult:
        """The record."""
        found = best is not None and best.usage >= 1.0
        if self.epsilon is None:
            compared = moving.radius if moving is not None and moving.usage >= 1.0 else math.inf
        else:
            compared = moving.usage if moving is not None else math.nan
        status = Status.FOUND if found else Status.NOT_FOUND if best is not None or moving is not None else Status.NAN
        return MeasureAttackResult(
            problem=self.digest,
            attack=NAME,
            status=status,
            radius=best.radius if best is not None else math.inf,
            usage=best.usage if best is not None else (math.nan if moving is None else moving.usage),
            perturbed=None if best is None else best.atoms.points,
            queries=self.queries,
            seconds=seconds,
            seed=self.seed,
            epsilon=self.epsilon,
            threat=self.threat.key,
            atoms=None if best is None else best.atoms,
            moving_radius=compared,
            source=self.problem.digest,
        )
