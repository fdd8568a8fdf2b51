"""The mass-splitting attack: a token's mass divides among displaced children."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnrobust.attacks.measures.expand import expand_layer, tokens_read
from attnrobust.attacks.measures.goal import MeasureReader, nearer, query_sensitivity
from attnrobust.attacks.measures.masses import refine_masses
from attnrobust.attacks.measures.split_starts import far_starts, kicked_starts, near_starts
from attnrobust.attacks.measures.splits import NEAR_FRACTIONS, Split, default_fractions, search_over
from attnrobust.attacks.method import AttackMethod, Attempt, Work, cut_short, left
from attnrobust.attacks.search.evaluate import OutOfQueries
from attnrobust.attacks.search.projected_gradient import search_rows
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.attacks.verification import VerifiedPoint, nothing, verify
from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.problem import Problem
from attnrobust.threats.measures import MeasureThreat
from attnrobust.tokens import PerturbedTokens

WORTH = 0.02
"""Another round follows where the last one improved by more than this share."""
MAX_SPLIT = 8
"""Tokens that are split when none are named: those whose own query reacts most."""
REFINED = 4
"""Best configurations whose masses and positions are refined together."""


class MassSplitting(AttackMethod):
    r"""Moves and splits tokens: the nearest measure found that violates the goal, or the strongest within epsilon.

    First the tokens move alone (masses kept together); from where that stalls, tokens split in two, in halves and in
    small shares, and masses and positions are refined together. Goals are read from the atoms: the mass-weighted mean,
    the row's first atom, or, for a displacement of all rows, ``sqrt(n) W_2`` between the output measures by exact
    transport (for n equal masses that moved a little this is the Frobenius norm). Without a domain a tiny mass may
    travel so far that it takes the attention of the other tokens.

    Args:
        tokens: Tokens that may split; None means all that may move, or the most sensitive ones of a long input. The
            token whose row the goal reads never splits.
        fractions: Shares of its mass that a token's second child gets, each in (0, 1); None means halves, a tenth, and
            the small shares that can afford to travel about as far as the tokens are apart.

    Raises:
        InputError: Fractions outside (0, 1).
    """

    name = "mass-splitting"
    threats = (MeasureThreat,)

    def __init__(self, *, tokens: Sequence[int] | None = None, fractions: Sequence[float] | None = None) -> None:
        bad = [f for f in fractions or () if not 0.0 < f < 1.0]
        if bad or (fractions is not None and not fractions):
            raise InputError(f"mass fractions must be in (0, 1); got {bad[0] if bad else 'none'}")
        self.tokens = None if tokens is None else tuple(tokens)
        self.fractions = None if fractions is None else tuple(fractions)

    def refuses_more(self, problem: Problem, epsilon: float | None) -> str | None:
        n = problem.clean.n
        try:
            expand_layer(problem.network, torch.arange(n, device=problem.clean.points.device), n)
        except UnsupportedModelError as error:
            return first_line(error)
        return None

    def search(self, work: Work) -> list[Attempt]:
        return [self._one(_Splitting(problem, work), work) for problem in work.problems]

    def _one(self, run: "_Splitting", work: Work) -> Attempt:
        moving = run.move()
        found = [] if moving is None else [moving]
        chosen = self._chosen(run.problem)
        best = moving
        for _ in range(work.budget.rounds if chosen else 0):
            before = math.inf if best is None else best.point.rank
            budget = math.inf if best is None else best.point.distance
            shares = self.fractions or default_fractions(
                run.problem, run.threat.order, budget if work.epsilon is None else work.epsilon
            )
            found += run.split(chosen, shares, moving, best)
            found += run.refine(found)
            best = _answer(found)
            if self.fractions is not None or not _improved(before, best):
                break
        return run.attempt(_answer(found), moving)

    def _chosen(self, problem: Problem) -> list[int]:
        """The tokens that split, most sensitive first."""
        n, read = problem.clean.n, tokens_read(problem)
        movable = problem.threat.movable(n)
        missing = [t for t in self.tokens or () if not 0 <= t < n or not bool(movable[t])]
        if missing:
            raise InputError(f"token {missing[0]} does not exist or may not move; it cannot split")
        allowed = [i for i in (range(n) if self.tokens is None else self.tokens) if bool(movable[i]) and i not in read]
        if len(allowed) <= MAX_SPLIT or self.tokens is not None:
            return allowed
        order = query_sensitivity(problem).argsort(descending=True).tolist()
        return [i for i in order if i in set(allowed)][:MAX_SPLIT]


@dataclass(frozen=True, eq=False)
class _Found:
    """Verified atoms."""

    point: VerifiedPoint
    atoms: PerturbedTokens


@dataclass(eq=False)
class _Splitting:
    """One input: its searches, each verified, and the evaluations that they spent."""

    problem: Problem
    work: Work
    queries: int = field(default=0, init=False)

    @property
    def threat(self) -> MeasureThreat:
        """The ball of measures."""
        threat = self.problem.threat
        assert isinstance(threat, MeasureThreat)  # noqa: S101 - the template refuses others; narrows the type
        return threat

    @property
    def seed(self) -> int:
        """Seed of this input."""
        return self.work.seed_of(self.problem, MassSplitting.name)

    def move(self) -> _Found | None:
        """Moving alone, measured by the same budget; where it does not violate the goal, its strongest point."""
        split = Split.of(self.problem, self.threat, (), 0.5)
        work = self.part(1)
        if work is None:
            return None
        search = search_over([split], self.threat.order, work, seed=self.seed, attack=MassSplitting.name)
        moved = TokenMoving().propose(search)[0]
        self.queries += int(search.evaluator.queries.sum())
        return self.best_of(split.atoms(moved))

    def part(self, searches: int) -> Work | None:
        """The work of one phase with so many searches: half of the queries that are left; None where that is none."""
        budget = self.work.budget
        rest = left(budget, self.queries)
        if rest is None:
            return self.work
        share = rest // (2 * searches)
        return replace(self.work, budget=replace(budget, queries=share)) if share else None

    def split(
        self, chosen: Sequence[int], fractions: Sequence[float], moving: _Found | None, best: _Found | None
    ) -> list[_Found]:
        """Search from where moving stalled (large shares) and from far journeys (small ones), shares side by side.

        Where the best point is already split, only journeys around it are searched again.
        """
        again = best is not None and best.atoms.points.shape[0] == self.problem.clean.n + len(chosen)
        large = [] if again else [f for f in fractions if f >= NEAR_FRACTIONS[-1]]
        small = [f for f in fractions if f < NEAR_FRACTIONS[-1]]
        found: list[_Found | None] = []
        for shares, kind in ((large, near_starts), (small, far_starts)):
            if not shares or self.work.out_of_time:
                continue
            splits = [Split.of(self.problem, self.threat, chosen, f) for f in shares]
            work = self.part(len(splits))
            if work is None:
                break
            search = search_over(splits, self.threat.order, work, seed=self.seed, attack=MassSplitting.name)
            points: Sequence[Tensor] = ()
            with suppress(OutOfQueries):
                if again and best is not None:
                    start = kicked_starts(search, best.atoms.displacement(self.problem.clean))
                else:
                    moved = None if moving is None else moving.atoms
                    start = kind(search, self.problem.clean, splits[0].parent, moving=moved)
                points = tuple(search_rows(search, search.evaluator, start, steps=work.budget.steps).points)
            self.queries += int(search.evaluator.queries.sum())
            found += [self.best_of(split.atoms(x)) for split, x in zip(splits, points, strict=False)]
        return [one for one in found if one is not None]

    def refine(self, found: Sequence[_Found]) -> list[_Found]:
        """Positions and masses together, from the best configurations."""
        refined: list[_Found | None] = []
        for one in sorted(found, key=lambda f: f.point.rank)[:REFINED]:
            rest = left(self.work.budget, self.queries)
            steps = self.work.budget.steps if rest is None else min(self.work.budget.steps, rest // 2)
            if self.work.out_of_time or steps == 0:
                break
            better, queries = refine_masses(
                self.problem,
                one.atoms,
                order=self.threat.order,
                steps=steps,
                domain_radius=self.threat.domain_radius,
            )
            self.queries += queries
            refined.append(self.best_of(better))
        return [one for one in refined if one is not None]

    def best_of(self, candidates: Sequence[PerturbedTokens]) -> _Found | None:
        """Polish, re-evaluate and re-measure candidates; the best one, or None where none is finite."""
        verified = [self._verified(atoms) for atoms in candidates]
        return min((v for v in verified if v is not None), key=lambda f: f.point.rank, default=None)

    def _verified(self, atoms: PerturbedTokens) -> _Found | None:
        atoms = nearer(self.problem, atoms, self.work.epsilon)
        reader = MeasureReader(self.problem, atoms.mass, atoms.parent)
        room = left(self.work.budget, self.queries)
        point = verify(reader, atoms.displacement(self.problem.clean)[None], epsilon=self.work.epsilon, limit=room)
        self.queries += point.queries
        return None if point.points is None else _Found(point, reader.atoms(point.points))

    def attempt(self, best: _Found | None, moving: _Found | None) -> Attempt:
        """The best answer; where there is none, the strongest point of moving alone."""
        shown = best or moving
        if moving is None:
            alone = math.inf if self.work.epsilon is None else math.nan
        else:
            alone = moving.point.radius if self.work.epsilon is None else moving.point.usage
        point = nothing(self.work.epsilon) if shown is None else shown.point
        return Attempt(
            point=point,
            failure=cut_short(point, self.work.budget),
            queries=self.queries,
            atoms=None if best is None else best.atoms,
            moving_radius=alone,
        )


def _answer(found: Sequence[_Found]) -> _Found | None:
    """The best point; without a fixed epsilon it violates the goal."""
    best = min(found, key=lambda f: f.point.rank, default=None)
    return best if best is not None and best.point.counts else None


def _improved(before: float, best: _Found | None) -> bool:
    """Whether a round was worth another one."""
    return best is not None and best.point.rank < before - WORTH * abs(before)
