"""The token-moving attack: every token keeps its mass and moves within the threat's set."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.attacks.method import MovingAttack, Search
from attnrobust.attacks.search.curvature import CURVATURE_STEPS, top_curvature
from attnrobust.attacks.search.directions import (
    LANCZOS_STEPS,
    margin_gradients,
    random_directions,
    singular_directions,
)
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.projected_gradient import Finish, Start, search_rows
from attnrobust.threats.moves import AnyToken, FrobeniusBall

MIN_BRANCHES = 8
"""Tokens of "any one token" that are searched at least: the first ones in the order of their first-order radius."""
BRANCH_LANCZOS_STEPS = 8
MAX_CLASSES = 64
"""Margins that are looked at to first order; the nearest ones are attacked."""
SCALES = (1.0, 0.1, 0.3, 0.03)
"""Distances of the random starts in units of the first-order radius: where the layer saturates, that is too far."""
KICKS = (0.5, 1.0, 0.25, 1.5)
"""Sizes of the random steps away from the best point, in units of its distance."""
FLAT = 0.05
"""Where the best radius is within this share of the first-order optimum and the second order says that it is no saddle
(up to the same share), later rounds are left out: the first-order optimum is the optimum at this scale."""
FEWEST_STEPS = 4
"""Under a limit on queries: steps that there is room for; only so many rows start."""
START_SHARE = 4
"""Under a limit on queries: the first-order starts take one such part of them at most."""
BEND_SIZE = 0.5
"""Steps along the steepest bend, both ways, in units of the best point's distance."""
TINY = 1e-300


class TokenMoving(MovingAttack):
    """Projected gradient ascent with restarts, from first-order optima and from random directions.

    Margins: each restart attacks one class (the nearest ones to first order); the gradient at the clean input gives the
    first start. Displacements: the leading right singular vectors of the Jacobian, with both signs. The rest is random.
    "Any one token": the tokens with the smallest first-order radii are searched, each by itself, in one batch.
    Later rounds start from random steps away from the best point and from random directions at its distance.
    """

    name: ClassVar[str] = "token-moving"

    def propose(self, search: Search) -> Float[Tensor, "p k n d"]:
        """Search from every start; see the module ``drivers.projected_gradient``."""
        evaluator, generators = search.evaluator, search.generators()
        start, first_order = first_starts(search, evaluator, generators)
        waiting = start.waiting
        start = _affordable_rows(search, evaluator, start)
        finish = search_rows(search, evaluator, start, steps=search.budget.steps)
        found = [finish.points, finish.violating]
        best, radius = finish, first_order
        for number in range(1, search.budget.rounds):
            if search.out_of_time:
                break
            bends = _bends(search, evaluator, start, best, radius, number)
            open_problems = bends.open
            if open_problems.numel() == 0:
                break
            best, radius, start = (
                _take_finish(best, open_problems),
                radius[open_problems],
                start.problems(open_problems),
            )
            generators = [generators[i] for i in open_problems.tolist()]
            evaluator = evaluator.take(open_problems)
            again = _next_starts(search, evaluator, generators, start, best, bends)
            if waiting is not None:
                waiting = waiting.problems(open_problems)
                again, waiting = _with_waiting(again, waiting)
            finish = search_rows(search, evaluator, again, steps=search.budget.steps)
            best = _better(best, finish)
            for points in (best.points, finish.violating):
                padded = points.new_full((found[0].shape[0], *points.shape[1:]), torch.nan)
                padded[_position(search, evaluator)] = points
                found.append(padded)
        return torch.cat(found, dim=1)


def _affordable_rows(search: Search, evaluator: Evaluator, start: Start) -> Start:
    """The first rows, so many that a limit on queries leaves them a few steps."""
    wanted = start.targets.shape[1]
    rows = max(1, search.part(evaluator, wanted, share=FEWEST_STEPS))
    if rows >= wanted:
        return start
    problems = torch.arange(start.targets.shape[0], device=start.targets.device)
    return start.take(problems, torch.arange(rows, device=problems.device).expand(problems.shape[0], -1))


def _position(search: Search, evaluator: Evaluator) -> Int[Tensor, "q"]:
    return evaluator.index.to(search.evaluator.device)


@dataclass(frozen=True, eq=False)
class _Bends:
    """Problems that are worth another round, and the steepest bend at the best point of those that are saddles.

    Args:
        open: Which problems.
        direction: Unit vectors of the open problems; zero where the first order does not explain the best point.
    """

    open: Int[Tensor, "q"]
    direction: Float[Tensor, "q n d"]


def _bends(
    search: Search, evaluator: Evaluator, start: Start, best: Finish, first_order: Float[Tensor, "p"], number: int
) -> _Bends:
    """Open are best points that the first order at the clean input does not explain, and those that are saddles."""
    merit = best.merit[:, 0]
    ratio = merit / first_order if search.epsilon is None else -merit * first_order / search.epsilon
    curved = ~((ratio - 1.0).abs() <= FLAT)  # an infinite merit is open, too
    direction = torch.zeros_like(best.points[:, 0])
    flat = (~curved & search.affordable(evaluator, CURVATURE_STEPS + 1).to(curved.device)).nonzero().flatten()
    if flat.numel():
        points, targets, part = best.points[flat, 0], best.targets[flat, 0], evaluator.take(flat)
        streams = [torch.Generator().manual_seed(search.seeds[i] ^ number) for i in part.index.tolist()]
        found = top_curvature(part, points, targets, _where_it_lives(start.problems(flat), points), streams)
        saddle = found.excess > 1.0 - FLAT
        curved[flat] = saddle
        direction[flat] = torch.where(saddle[:, None, None], found.direction, 0.0)
    index = curved.nonzero().flatten()
    return _Bends(index, direction[index])


def _where_it_lives(start: Start, points: Float[Tensor, "p n d"]) -> Bool[Tensor, "p n"]:
    """Tokens that may move with these points; a branch of "any one token" keeps its token."""
    moved = (points != 0).any(dim=-1)
    branch = (start.allowed & moved[:, None]).flatten(2).any(dim=-1).int().argmax(dim=1)
    return start.allowed[torch.arange(points.shape[0], device=points.device), branch]


def _take_finish(finish: Finish, index: Tensor) -> Finish:
    return Finish(finish.points[index], finish.targets[index], finish.merit[index], finish.violating[index])


def _better(old: Finish, new: Finish) -> Finish:
    merit = torch.cat([old.merit, new.merit], dim=1)
    order = merit.argsort(dim=1, stable=True)[:, : old.merit.shape[1]]
    at = torch.arange(order.shape[0], device=order.device)[:, None]
    points, targets = torch.cat([old.points, new.points], dim=1), torch.cat([old.targets, new.targets], dim=1)
    return Finish(points[at, order], targets[at, order], merit[at, order], new.violating)


def _next_starts(
    search: Search,
    evaluator: Evaluator,
    generators: list[torch.Generator],
    start: Start,
    best: Finish,
    bends: _Bends,
) -> Start:
    """Steps away from the best point (half of the rows), and new random directions at its distance.

    The steps are random; from a saddle the first two go along its steepest bend, one to each side.
    """
    rows = search.budget.restarts
    half = max(1, rows // 2)
    p, n, d = evaluator.points.shape
    random = random_directions(generators, rows, (n, d), evaluator.points)
    center, distance = best.points[:, 0], start.threat.distance(best.points[:, 0])
    # The steps stay where the best point lives; the other rows of "any one token" take the first branches.
    cycle = torch.arange(rows - half, device=random.device) % start.allowed.shape[1]
    home = _where_it_lives(start, center)[:, None].expand(p, half, n)
    allowed = torch.cat([home, start.allowed[:, cycle]], dim=1)
    bent = torch.stack([bends.direction, -bends.direction], dim=1)[:, :half]
    saddle = (bent != 0).flatten(2).any(dim=-1)[..., None, None]
    random[:, : bent.shape[1]] = torch.where(saddle, bent, random[:, : bent.shape[1]])
    random = random * allowed[..., None]
    random = random / start.threat.distance(random).clamp_min(TINY)[..., None, None]
    size = random.new_tensor(KICKS)[torch.arange(half, device=random.device) % len(KICKS)]
    size = size.repeat(p, 1)
    size[:, : bent.shape[1]] = torch.where(saddle[..., 0, 0], BEND_SIZE, size[:, : bent.shape[1]])
    kicked = center[:, None] + (size * distance[:, None])[..., None, None] * random[:, :half]
    targets = torch.cat([best.targets[:, :1].expand(p, half), start.targets[:, cycle]], dim=1)
    scales = random.new_tensor(SCALES)[torch.arange(rows - half, device=random.device) % len(SCALES)] ** 0.5
    radius = distance[:, None] * torch.cat([random.new_full((half,), 0.95), scales])
    if search.epsilon is not None:
        radius = torch.full_like(radius, search.epsilon)
    return Start(torch.cat([kicked, random[:, half:]], dim=1), targets, radius, allowed, start.threat)


def _with_waiting(start: Start, waiting: Start) -> tuple[Start, Start | None]:
    """Some new random rows replaced by first-order optima of classes that no row attacked yet; and those still left."""
    rows, more = start.targets.shape[1], waiting.targets.shape[1]
    count = min(max(0, rows - max(1, rows // 2) - 1), more)  # one stays random

    def placed(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old[:, : rows - count], new[:, :count]], dim=1)

    merged = Start(
        placed(start.directions, waiting.directions),
        placed(start.targets, waiting.targets),
        placed(start.radius, waiting.radius),
        placed(start.allowed, waiting.allowed),
        start.threat,
    )
    problems = torch.arange(start.targets.shape[0], device=start.targets.device)
    rest = torch.arange(count, more, device=problems.device).expand(problems.shape[0], -1)
    return merged, waiting.take(problems, rest) if count < more else None


# ---- first round -------------------------------------------------------------------------------------------------


def first_starts(
    search: Search, evaluator: Evaluator, generators: list[torch.Generator]
) -> tuple[Start, Float[Tensor, "p"]]:
    """First-order optima and random directions; with the smallest radius that the first order predicts."""
    p, n = evaluator.points.shape[:2]
    rows = search.budget.restarts
    if isinstance(search.threat, AnyToken):
        start, slope = branch_starts(search, evaluator, generators)
        order = slope.argsort(dim=1, descending=True, stable=True)[:, : max(MIN_BRANCHES, rows)]
        chosen = start.take(torch.arange(p, device=slope.device), order)
        return both_signs(chosen), 1.0 / slope.amax(dim=1).clamp_min(TINY)
    allowed = evaluator.movable[:, None]
    random = random_directions(generators, rows, evaluator.points.shape[1:], evaluator.points) * allowed[..., None]
    waiting = None
    if evaluator.goal.functionals is None:
        directions, targets, radius = _displacement_rows(search, evaluator, random, allowed)
    else:
        directions, targets, radius = _margin_rows(search, evaluator, rows)
        first = min(targets.shape[1], max(1, (rows + 1) // 2))
        waiting = _waiting(search, directions, targets, radius, allowed, first)
        directions, targets, radius = directions[:, :first], targets[:, :first], radius[:, :first]
    first = directions.shape[1]
    filled = torch.arange(rows, device=radius.device) % first
    directions = torch.cat([_replace_zero(directions, random[:, :first]), random[:, first:]], dim=1)
    scales = radius.new_tensor(SCALES)[torch.arange(rows - first, device=radius.device) % len(SCALES)]
    scale = torch.cat([radius.new_ones(first), scales])
    wanted = radius[:, filled] * scale if search.epsilon is None else scale.expand(p, rows) * search.epsilon
    allowed = allowed.expand(p, rows, n)
    return Start(directions, targets[:, filled], wanted, allowed, search.threat, waiting), radius.amin(dim=1)


def _waiting(
    search: Search, directions: Tensor, targets: Tensor, radius: Tensor, allowed: Tensor, first: int
) -> Start | None:
    """First-order optima of the classes behind the first ones: later rounds start from them."""
    later = min(targets.shape[1], first + (search.budget.rounds - 1) * first)
    if later <= first or search.epsilon is not None:
        return None
    part = slice(first, later)
    rows = allowed.expand(-1, later - first, -1)
    return Start(directions[:, part], targets[:, part], radius[:, part], rows, search.threat)


def _displacement_rows(
    search: Search, evaluator: Evaluator, random: Tensor, allowed: Tensor
) -> tuple[Tensor, Int[Tensor, "p r"], Tensor]:
    """Leading right singular vectors with both signs; in units of the budget the singular value is share per length."""
    vectors = max(1, search.budget.restarts // 4)
    steps = search.part(evaluator, LANCZOS_STEPS, share=START_SHARE)
    found, values = singular_directions(evaluator, random[:, :1], allowed, count=vectors, steps=steps)
    signed = torch.stack([found[:, 0], -found[:, 0]], dim=2).flatten(1, 2)[:, : search.budget.restarts]
    radius = search.threat.distance(signed) / values[:, 0].repeat_interleave(2, dim=1)[:, : signed.shape[1]]
    return signed, torch.zeros(signed.shape[:2], dtype=torch.int64, device=signed.device), _positive(evaluator, radius)


def _margin_rows(search: Search, evaluator: Evaluator, rows: int) -> tuple[Tensor, Int[Tensor, "p r"], Tensor]:
    """The nearest classes to first order, one row each along the steepest direction of its margin."""
    classes = _nearest_classes(search, evaluator)
    gradients = _gradients(search, evaluator, classes)
    gradients = gradients * evaluator.movable[:, None, :, None]
    radius = _positive(evaluator, 1.0 / search.threat.dual_norm(gradients))
    nearest = radius.argsort(dim=1, stable=True)[:, : search.budget.rounds * max(1, (rows + 1) // 2)]
    at = torch.arange(classes.shape[0], device=classes.device)[:, None]
    return search.threat.steepest(gradients[at, nearest]), classes[at, nearest], radius[at, nearest]


def _nearest_classes(search: Search, evaluator: Evaluator) -> Int[Tensor, "p c"]:
    """Classes that are looked at to first order: those with the least room, as many as a limit on queries affords."""
    most = max(1, search.part(evaluator, MAX_CLASSES, share=START_SHARE))
    return evaluator.goal.budgets.argsort(dim=1, stable=True)[:, :most]


def _gradients(search: Search, evaluator: Evaluator, classes: Int[Tensor, "p c"]) -> Float[Tensor, "p c n d"]:
    """Gradients of these margins at the clean inputs; zero, as unknown, where they cannot be afforded."""
    if bool(search.affordable(evaluator, classes.shape[1]).all()):
        return margin_gradients(evaluator, classes)
    return evaluator.points.new_zeros(*classes.shape, *evaluator.points.shape[1:])


def _positive(evaluator: Evaluator, radius: Tensor) -> Tensor:
    """Replace the infinite radius of a zero slope by the size of the tokens."""
    size = torch.linalg.vector_norm(evaluator.points, dim=(-2, -1)).clamp_min(1.0)
    return torch.where(torch.isfinite(radius), radius, size[:, None])


def _replace_zero(directions: Tensor, random: Tensor) -> Tensor:
    zero = torch.linalg.vector_norm(directions, dim=(-2, -1), keepdim=True) == 0
    return torch.where(zero, random, directions)


# ---- any one token -----------------------------------------------------------------------------------------------


def both_signs(start: Start) -> Start:
    """Every row twice: along its direction and against it (the second order tells them apart)."""
    return Start(
        torch.cat([start.directions, -start.directions], dim=1),
        start.targets.repeat(1, 2),
        start.radius.repeat(1, 2),
        start.allowed.repeat(1, 2, 1),
        start.threat,
    )


def branch_starts(
    search: Search, evaluator: Evaluator, generators: list[torch.Generator]
) -> tuple[Start, Float[Tensor, "p r"]]:
    """One row per movable token, at its own first-order optimum, and the share per unit length there."""
    p, n, d = evaluator.points.shape
    tokens = evaluator.movable[0].nonzero().flatten()
    allowed = torch.nn.functional.one_hot(tokens, n).bool().expand(p, -1, n)
    branches = tokens.numel()
    random = random_directions(generators, branches, (n, d), evaluator.points) * allowed[..., None]
    if evaluator.goal.functionals is None:
        steps = search.part(evaluator, BRANCH_LANCZOS_STEPS * branches, share=START_SHARE) // max(1, branches)
        found, values = singular_directions(evaluator, random, allowed, count=1, steps=steps)
        directions, slope = found[:, :, 0], values[:, :, 0]
        targets = torch.zeros(p, branches, dtype=torch.int64, device=evaluator.device)
    else:
        classes = _nearest_classes(search, evaluator)
        gradients = _gradients(search, evaluator, classes)
        slope, best = torch.linalg.vector_norm(gradients, dim=-1)[:, :, tokens].max(dim=1)
        at = torch.arange(p, device=best.device)[:, None]
        targets = classes[at, best]
        directions = gradients[at, best] * allowed[..., None]
    directions = _replace_zero(directions, random)
    radius = _positive(evaluator, 1.0 / slope) if search.epsilon is None else torch.full_like(slope, search.epsilon)
    return Start(directions, targets, radius, allowed, FrobeniusBall()), slope
