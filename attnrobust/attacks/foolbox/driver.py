"""foolbox attacks as drivers: they propose, the template projects, re-evaluates and re-measures.

An attack sees one problem at a time, with its restarts as the batch, so inputs share neither a random stream nor a
failure. It searches over ``Y`` with token moves ``D = offset + unit Y``, from Y = 0: a zero vector that stands for a
failure is the clean input here, and default step lengths fit because the nearest violation has about length 1. Its
model has a score 0 for "the goal holds" and one for "violated": of a margin, each restart attacks one class, the
nearest ones to first order.
"""

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrobust.attacks.foolbox.names import PREFIX, FoolboxEntry, foolbox_entry
from attnrobust.attacks.method import AttackMethod, Attempt, MovingAttack, Search, Work
from attnrobust.attacks.search.directions import random_directions
from attnrobust.attacks.token_moving import first_starts
from attnrobust.errors import first_line
from attnrobust.results import Status
from attnrobust.threats.moves import AnyToken, MoveThreat, PerTokenBall

HANG_SECONDS = 300.0
"""Wall time of one call where the budget names none: an attack that never returns must not end the run."""
OFFSETS = (0.0, 0.1, 0.3, 0.03)
"""Distances of the restarts' offsets in units of the first-order radius."""
FIRST_OFFSET = 0.01
"""The smallest one for displacements, whose slope is zero at the clean input."""
FINALISTS = 4
"""Proposals of one call that are verified: those with the smallest predicted radius."""
LARGEST_CHANGE = 4.0
"""The size of a fixed-size attack changes by at most this factor from round to round."""
CLOSE = 1e-3
"""Sizes that agree this well need no further round."""
FARTHEST = 1e6
"""First-order radii beyond this many sizes of the input say nothing (a zero slope)."""
LATE, EXHAUSTED = "did not return in time", "the queries are used up"
TINY = 1e-300


@dataclass(frozen=True)
class Outcome:
    """How the calls on one problem went: a status if one of them failed, and why."""

    status: Status | None = None
    note: str = ""


class FoolboxAttack(MovingAttack):
    """One foolbox attack with the face of ours.

    Args:
        entry: What the table says about the attack.
    """

    name = PREFIX

    def __init__(self, entry: FoolboxEntry) -> None:
        self.entry = entry
        self.outcomes: list[Outcome] = []

    def search(self, work: Work) -> list[Attempt]:
        """Attack the problems one after the other; a failed call is the status of its own row, with a note."""
        this_run = copy.copy(self)
        this_run.outcomes = []
        attempts = super(FoolboxAttack, this_run).search(work)
        return [
            replace(attempt, failure=outcome.status, note=outcome.note)
            for attempt, outcome in zip(attempts, this_run.outcomes, strict=True)
        ]

    def propose(self, search: Search) -> Float[Tensor, "p k n d"]:
        """The calls of every problem, each with its own seed and its share of the time that is left."""
        start, first_order = first_starts(search, search.evaluator, search.generators())
        count = len(search.seeds)
        found: list[Tensor] = []
        for i in range(count):
            directions = start.directions[i] * start.allowed[i][..., None]
            query = _Query(self.entry, search, i, directions, start.allowed[i], start.targets[i], float(first_order[i]))
            left = search.deadline - time.perf_counter()
            seconds = HANG_SECONDS if math.isinf(left) else left / (count - i)
            proposals, outcome = query.ask(search.seeds[i], deadline=time.perf_counter() + seconds)
            self.outcomes.append(outcome)
            found.append(proposals)
        most = max(points.shape[0] for points in found)
        result = torch.full((count, most, *search.evaluator.points.shape[1:]), torch.nan).to(search.evaluator.points)
        for i, points in enumerate(found):
            result[i, : points.shape[0]] = points
        return result


def foolbox_attack(name: str) -> AttackMethod:
    """The foolbox attack of that name (``foolbox:L2PGD``) as a method; does not import foolbox yet.

    Raises:
        UnknownNameError: A name that foolbox does not have.
        InputError: A refused attack; says why and what to use instead.
    """
    return method_of(foolbox_entry(name))


def method_of(entry: FoolboxEntry) -> AttackMethod:
    """A table entry as an attack method."""
    kind = type("FoolboxAttack", (FoolboxAttack,), {"name": PREFIX + entry.name, "__doc__": FoolboxAttack.__doc__})
    method: AttackMethod = kind(entry)
    return method


class _Query:
    """One problem as foolbox sees it, and the best points that the attack asked about."""

    def __init__(
        self,
        entry: FoolboxEntry,
        search: Search,
        index: int,
        directions: Float[Tensor, "r n d"],
        allowed: Bool[Tensor, "r n"],
        targets: Int[Tensor, "r"],
        radius: float,
    ) -> None:
        self.entry, self.search, self.index, self.targets = entry, search, index, targets
        self.evaluator = search.evaluator.take(torch.tensor([index]))
        self.problem = self.evaluator.problems[0]
        self.keep = allowed[..., None].to(directions.dtype)
        threat: MoveThreat = self.problem.moves
        unit_moves = directions / threat.distance(directions).clamp_min(TINY)[:, None, None]
        size = float(torch.linalg.vector_norm(self.problem.clean.points))
        reference = radius if radius < FARTHEST * max(size, 1.0) else max(size, 1.0)
        p = entry.norm
        if search.epsilon is not None and entry.fixed:
            reference = search.epsilon
            self.unit = reference * ball_factor(threat, *self.problem.clean.points.shape, p=p)
        else:
            self.unit = reference * float(torch.linalg.vector_norm(unit_moves[0], ord=p))
        share = directions.new_tensor(OFFSETS)[torch.arange(directions.shape[0], device=directions.device) % 4]
        if self.problem.resolved.functionals is None:
            share = share.clamp_min(FIRST_OFFSET)
        elif isinstance(threat, AnyToken):
            share = torch.zeros_like(share)  # the rows differ in their tokens
        # Random, not first-order optima: what is found is foolbox's merit, and a zero slope has no direction.
        (random,) = random_directions(
            [torch.Generator().manual_seed(search.seeds[index])], directions.shape[0], directions.shape[1:], directions
        )
        random = random * self.keep
        size_of = threat.distance(random).clamp_min(TINY)
        self.offset = random * (share * reference / size_of)[:, None, None]
        self.entries = int(self.keep.sum(dim=(1, 2)).amax()) * directions.shape[2]
        self.deadline = math.inf
        self.best: list[Tensor] = []
        self.best_value = math.inf

    # ---- what foolbox calls ----------------------------------------------------------------------------------------

    def scores(self, y: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """0 for "the goal holds", and by how much the row's budget is exceeded."""
        from attnrobust.attacks.foolbox.library import Interrupted

        if time.perf_counter() > self.deadline:
            raise Interrupted(LATE)
        if y.shape != self.offset.shape:
            raise ValueError(f"asked about the shape {tuple(y.shape)}; {tuple(self.offset.shape)} was given")
        if not bool(self.search.affordable(self.evaluator, y.shape[0])):
            raise Interrupted(EXHAUSTED)
        self.evaluator.queries[self.evaluator.index] += y.shape[0]
        delta = self.moves(y)
        chunk = self.evaluator.rows_at_once
        if chunk >= y.shape[0]:
            shares = self._shares(delta)
        else:
            parts = [checkpoint(self._shares, part, use_reentrant=False) for part in delta.split(chunk)]
            shares = torch.cat(parts)
        self._remember(delta.detach(), shares.detach().amax(dim=1))
        excess = shares.gather(1, self.targets[:, None]) - 1.0
        return torch.cat([torch.zeros_like(excess), excess], dim=1)

    def moves(self, y: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Token moves of foolbox's variables."""
        moved: Tensor = self.offset + self.unit * self.keep * y
        return moved

    def _shares(self, delta: Tensor) -> Tensor:
        goal = self.problem.resolved
        output = self.evaluator.output(0, self.problem.clean.points + delta)
        shares: Tensor = goal.changes(output) / goal.violated_at
        return shares

    @torch.no_grad()
    def _remember(self, delta: Tensor, usage: Tensor) -> None:
        """Keep the best point asked about: the nearest violation, or at a fixed epsilon the largest use inside it."""
        distance = self.problem.moves.distance(delta)
        epsilon = self.search.epsilon
        if epsilon is None:
            value = torch.where(usage >= 1.0, distance, math.inf)
        else:
            inside = (distance <= epsilon) & (usage >= 1.0)
            value = torch.where(inside, -usage, math.inf)
        value = value.nan_to_num(math.inf, math.inf, math.inf)
        if float(value.min()) < self.best_value:
            self.best_value = float(value.min())
            self.best = [delta[value.argmin()].clone()]

    # ---- what we call ----------------------------------------------------------------------------------------------

    def ask(self, seed: int, *, deadline: float) -> tuple[Float[Tensor, "k n d"], Outcome]:
        """Run the attack (a fixed-size one at several sizes where the radius is wanted); never raises for its sake."""
        from attnrobust.attacks.foolbox import library

        self.deadline = deadline
        start = torch.zeros_like(self.offset)
        model = library.QueryModel(self.scores, box=math.inf if self.entry.box is None else self.entry.box)
        wanted = self.search.epsilon
        rounds = self.search.budget.rounds if self.entry.fixed and wanted is None else 1
        found, outcome, size = [start[:0]], Outcome(), 1.0
        device = self.offset.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in range(rounds):
                attack = library.make_attack(self.entry, steps=self.search.budget.steps, entries=self.entries)
                epsilon = size if self.entry.fixed else None

                def call() -> Tensor:
                    return library.call_attack(attack, model, start, epsilon=epsilon)  # noqa: B023 - runs at once

                raw = library.run_limited(call, seconds=max(0.0, deadline - time.perf_counter()))
                outcome = self._outcome(raw)
                if not isinstance(raw, Tensor):
                    break
                raw = raw.detach()
                points, best_usage = self._shortlist(self.moves(raw)[(raw != 0).flatten(1).any(dim=1)])
                found.append(points)
                change = min(LARGEST_CHANGE, max(1.0 / LARGEST_CHANGE, 1.0 / max(best_usage, TINY)))
                if abs(change - 1.0) < CLOSE:
                    break
                size *= change
        candidates = torch.cat([*found, *(x[None] for x in self.best)])
        if wanted is not None:  # points inside of the ball may gain by going to its boundary
            length = self.problem.moves.distance(candidates)
            grown = candidates * (wanted / length.clamp_min(TINY)).clamp_max(1.0 / TINY)[:, None, None]
            candidates = torch.cat([candidates, grown[length > 0]])
        return candidates, outcome

    def _outcome(self, raw: Tensor | BaseException) -> Outcome:
        from attnrobust.attacks.foolbox.library import Interrupted

        who = PREFIX + self.entry.name
        if isinstance(raw, Interrupted):
            why = str(raw) or LATE
            return Outcome(Status.NOT_FOUND if why == EXHAUSTED else Status.TIMEOUT, f"{who} stopped: {why}")
        if isinstance(raw, BaseException):
            said = f": {first_line(raw)}" if str(raw).strip() else ""
            return Outcome(Status.ERROR, f"{who} failed: {type(raw).__name__}{said}")
        if raw.shape != self.offset.shape:
            return Outcome(Status.ERROR, f"{who} returned the shape {tuple(raw.shape)}, not {tuple(self.offset.shape)}")
        if not bool(torch.isfinite(raw).flatten(1).all(dim=1).any()):
            return Outcome(Status.NAN, f"{who} returned NaN or infinite points only")
        if not bool((raw != 0).any()):
            return Outcome(Status.NOT_FOUND, f"{who} returned the clean input")
        return Outcome()

    @torch.no_grad()
    def _shortlist(self, delta: Float[Tensor, "r n d"]) -> tuple[Float[Tensor, "k n d"], float]:
        """The finite proposals of smallest predicted radius (or largest use), and the largest use (0 for none)."""
        delta = delta[torch.isfinite(delta).flatten(1).all(dim=1)]
        delta = delta[: self.search.part(self.evaluator, delta.shape[0], share=1)]
        if delta.shape[0] == 0:
            return delta, 0.0
        epsilon = self.search.epsilon
        inside = delta if epsilon is None else self.problem.moves.project(delta, epsilon)
        usage = torch.cat([self._shares(part).amax(dim=1) for part in inside.split(self.evaluator.rows_at_once)])
        self.evaluator.queries[self.evaluator.index] += delta.shape[0]
        value = self.problem.moves.distance(delta) / usage.clamp_min(TINY) if epsilon is None else -usage
        order = value.nan_to_num(math.inf, math.inf, math.inf).argsort(stable=True)[:FINALISTS]
        return inside[order], float(usage.nan_to_num(0.0).amax())


def ball_factor(threat: MoveThreat, n: int, d: int, *, p: float) -> float:
    """Largest p-norm of all entries over the threat's unit ball: a ball of that size holds the set."""
    if p == 2.0:
        return threat.frobenius_factor(n, d)
    linf_rows = isinstance(threat, PerTokenBall) and threat.norm == "linf"
    if math.isinf(p):
        return 1.0
    moved = 1 if isinstance(threat, AnyToken) else int(threat.movable(n).sum())
    if isinstance(threat, PerTokenBall):
        per_row = float(d) if linf_rows else 1.0 if threat.norm == "l1" else math.sqrt(d)
        return moved * per_row
    return math.sqrt(moved * d)
