"""Gradient search over a threat's set: largest used budget at a fixed epsilon, or the nearest point that uses it all.

One loop for both modes and every threat. At a point D with used share s and gradient g the share is linearised; the
best point of the linearised problem is ``r * steepest(g)`` with r = epsilon (fixed) or, for the minimal radius,
``r = (1 - s + <g, D>) / dual_norm(g)``: the nearest point of the linearised constraint. The trial moves from D
towards it by an adaptive share alpha with momentum, and is accepted only if its merit improves: the share (fixed), or
the radius at which its ray is predicted to use the whole budget (minimal). For a convex share alpha = 1 is the
generalised power method, which ascends monotonically.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.attacks.method import Search
from attnrobust.attacks.search.evaluate import REACHED, Evaluator
from attnrobust.attacks.search.geometry import Geometry

MOMENTUM = 0.25
SHRINK, GROW = 0.35, 1.6
STATIONARY = 1e-4
"""A row has converged when the linearised optimum promises a smaller relative gain (far below the 1 % that matters)."""
SMALLEST_STEP, LONGEST_STEP = 1e-3, 100.0
"""Step sizes: a share of the way (mixing, at most 1), or a multiple of the set's size (projected gradient)."""
TRUSTED = 0.2
"""The predicted radius of a ray is trusted where the share is within this distance of 1."""
KEEP_AFTER = ((0.15, 0.5), (0.3, 0.25))
"""Successive halving: after this share of the steps only this share of the rows goes on (at least two)."""
PATIENCE, PROGRESS = 6, 3e-4
"""A row ends when its merit improves by less than this share within so many steps."""
MAX_RESCALES = 5
"""Moves along the ray in a row before a point is taken as it is."""
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Start:
    """Where the rows of every problem start.

    Args:
        directions: (p, r, n, d), any positive length.
        targets: Which budget each row attacks, (p, r).
        radius: First distance of each row, (p, r).
        allowed: Which tokens may move in each row, (p, r, n).
        threat: Geometry of each row's set (one known token for a branch of "any token").
        waiting: Rows that later rounds may start from; not a part of what ``take`` takes.
    """

    directions: Float[Tensor, "p r n d"]
    targets: Int[Tensor, "p r"]
    radius: Float[Tensor, "p r"]
    allowed: Bool[Tensor, "p r n"]
    threat: Geometry
    waiting: "Start | None" = None

    def take(self, problems: Int[Tensor, "q"], rows: Int[Tensor, "q s"]) -> "Start":
        """Some rows of some problems."""
        at = problems[:, None]
        directions, targets = self.directions[at, rows], self.targets[at, rows]
        return Start(directions, targets, self.radius[at, rows], self.allowed[at, rows], self.threat)

    def problems(self, index: Int[Tensor, "q"]) -> "Start":
        """All rows of some problems."""
        every = torch.arange(self.targets.shape[1], device=index.device).expand(index.shape[0], -1)
        return self.take(index, every)


@dataclass(eq=False)
class _Rows:
    """Search state: the best point of each row and the trial to evaluate next."""

    trial: Tensor
    targets: Tensor
    keep: Tensor
    best: Tensor
    previous: Tensor
    gradient: Tensor
    share: Tensor
    merit: Tensor
    alpha: Tensor
    done: Tensor
    rescaled: Tensor
    projected: Tensor
    milestone: Tensor
    low: Tensor
    high: Tensor
    violating: Tensor
    violation: Tensor

    @classmethod
    def begin(cls, start: Start) -> "_Rows":
        keep = start.allowed[..., None].to(start.directions.dtype)
        trial = _to_distance(start.threat, start.directions * keep, start.radius)
        merit = torch.full_like(trial[..., 0, 0], math.inf)
        return cls(
            trial, start.targets, keep, trial, trial, torch.zeros_like(trial), torch.zeros_like(merit), merit,
            torch.ones_like(merit), torch.zeros_like(merit, dtype=torch.bool),
            torch.zeros_like(merit), torch.zeros_like(merit, dtype=torch.bool), merit,
            torch.zeros_like(merit), merit, torch.full_like(trial, math.nan), merit,
        )  # fmt: skip

    def take(self, problems: Tensor, rows: Tensor) -> "_Rows":
        at = problems[:, None]
        return _Rows(**{name: value[at, rows] for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Finish:
    """Where the best rows ended.

    Args:
        points: (p, k, n, d).
        targets: Budget that each attacked, (p, k).
        merit: Predicted radius of its ray, or minus its share at a fixed epsilon; infinity where nothing was found.
        violating: The nearest violation that any row met; NaN where none did, and at a fixed epsilon.
    """

    points: Float[Tensor, "p k n d"]
    targets: Int[Tensor, "p k"]
    merit: Float[Tensor, "p k"]
    violating: Float[Tensor, "p 1 n d"]


def search_rows(search: Search, evaluator: Evaluator, start: Start, *, steps: int, finalists: int = 2) -> "Finish":
    """Run the search of every row; rows of one problem compete, problems do not see each other.

    Args:
        search: Mode, budget and deadline.
        evaluator: The stacked problems.
        start: Starting rows.
        steps: Gradient steps.
        finalists: Rows that survive successive halving at least.

    Returns:
        The best points of the surviving rows, best first; there may be fewer than ``finalists``.
    """
    rows = _Rows.begin(start)
    total = rows.targets.shape[1]
    count = min(finalists, total)
    result = Finish(
        rows.trial[:, :count].clone(), rows.targets[:, :count].clone(), rows.merit[:, :count].clone(),
        torch.full_like(rows.trial[:, :1], math.nan),
    )  # fmt: skip
    problems = search.affordable(evaluator, total).to(evaluator.device).nonzero().flatten()
    if problems.numel() == 0:
        return result
    if problems.numel() < rows.targets.shape[0]:
        every = torch.arange(total, device=problems.device).expand(problems.shape[0], -1)
        rows, evaluator = rows.take(problems, every), evaluator.take(problems)
    cuts = [(max(2, round(share * steps)), max(count, math.ceil(kept * total))) for share, kept in KEEP_AFTER]
    for step in range(steps):
        _step(search, evaluator, start.threat, rows)
        if step % PATIENCE == PATIENCE - 1:
            rows.done |= (rows.milestone - rows.merit) <= PROGRESS * rows.merit.abs()  # inf - inf is NaN: goes on
            rows.milestone = rows.merit
        wanted = min([rows.targets.shape[1]] + [kept for after, kept in cuts if step + 1 == after])
        going = ~rows.done.all(dim=1) & search.affordable(evaluator, wanted).to(evaluator.device)
        if search.out_of_time or step + 1 == steps:
            going = torch.zeros_like(going)
        if bool(going.all()) and wanted == rows.targets.shape[1]:
            continue
        order = rows.merit.argsort(dim=1, stable=True)
        everyone = torch.arange(order.shape[0], device=order.device)
        first = rows.take(everyone, order[:, :count])
        result.points[problems] = _finished(search, start.threat, first)
        result.targets[problems], result.merit[problems] = first.targets, first.merit
        result.violating[problems] = _nearest_violation(rows)
        stay = going.nonzero().flatten()
        if stay.numel() == 0:
            break
        if stay.numel() < problems.shape[0]:
            evaluator = evaluator.take(stay)
        rows, problems = _with_violation_kept(rows, stay, order[stay, :wanted]), problems[stay]
    return result


def _with_violation_kept(rows: _Rows, problems: Tensor, chosen: Tensor) -> _Rows:
    """Some rows of some problems; the nearest violation of the others goes on in the first row."""
    kept = rows.take(problems, chosen)
    kept.violating[:, :1], kept.violation[:, 0] = (
        _nearest_violation(rows)[problems],
        rows.violation.amin(dim=1)[problems],
    )
    return kept


def _nearest_violation(rows: _Rows) -> Tensor:
    nearest = rows.violation.argmin(dim=1)
    return rows.violating[torch.arange(nearest.shape[0], device=nearest.device), nearest][:, None]


def _step(search: Search, evaluator: Evaluator, threat: Geometry, rows: _Rows) -> None:
    shares, gradient = evaluator.shares_and_gradient(rows.trial, rows.targets)
    share = shares.gather(-1, rows.targets[..., None]).squeeze(-1)
    gradient = gradient * rows.keep
    slope = _dot(gradient, rows.trial)
    distance = threat.distance(rows.trial)
    finite = torch.isfinite(share) & torch.isfinite(gradient).flatten(2).all(dim=-1)
    resolution = evaluator.resolution
    reached = (share - 1.0).abs() <= resolution
    predicted = torch.where(reached, distance, distance * (1.0 + (1.0 - share) / slope))
    if search.epsilon is None:
        predicted = _bracketed(rows, distance, share, predicted)
        near = (share - 1.0).abs() <= TRUSTED
        merit = torch.where(near & ((slope > 0) | reached), predicted, math.inf)
        rescale = ~near & torch.isfinite(predicted) & (rows.rescaled < MAX_RESCALES)
        _remember(rows, distance, share, resolution)
    else:
        merit, rescale = -share, torch.zeros_like(finite)
    merit = torch.where(finite, merit, math.inf)
    first = torch.isinf(rows.merit) & finite
    accept = ~rows.done & ((merit < rows.merit) | first) & ~rescale
    rejected = torch.where(rescale, rows.alpha, rows.alpha * SHRINK)
    rows.alpha = torch.where(accept, rows.alpha * GROW, rejected)
    rows.rescaled = torch.where(rescale, rows.rescaled + 1, 0.0)
    rows.projected ^= ~accept & ~rescale
    rows.alpha = torch.minimum(rows.alpha, torch.where(rows.projected, LONGEST_STEP, 1.0))
    rows.previous = _pick(accept, torch.where(first[..., None, None], rows.trial, rows.best), rows.previous)
    rows.best, rows.gradient = _pick(accept, rows.trial, rows.best), _pick(accept, gradient, rows.gradient)
    rows.share, rows.merit = torch.where(accept, share, rows.share), torch.where(accept, merit, rows.merit)
    rows.done |= (rows.alpha < SMALLEST_STEP) | ~(finite | torch.isfinite(rows.merit))
    proposed = _propose(search, threat, rows, momentum=accept & ~first)
    factor = (predicted / distance).clamp(0.2, 5.0)
    rows.low, rows.high = torch.where(rescale, rows.low, 0.0), torch.where(rescale, rows.high, math.inf)
    rows.trial = _pick(rescale, rows.trial * factor[..., None, None], proposed)


def _bracketed(rows: _Rows, distance: Tensor, share: Tensor, predicted: Tensor) -> Tensor:
    """Newton's prediction along the ray, kept inside the bracket of distances that fell short and that did not.

    Where neither Newton nor a bracket says anything (the share falls outwards), the distance doubles.
    """
    rows.low = torch.where(share < 1.0, torch.maximum(rows.low, distance), rows.low)
    rows.high = torch.where(share >= 1.0, torch.minimum(rows.high, distance), rows.high)
    # A share that misses 1 by rounding predicts an end of the bracket itself, or misses it by rounding.
    inside = (predicted >= rows.low * (1.0 - REACHED)) & (predicted <= rows.high * (1.0 + REACHED))
    middle = torch.where(torch.isinf(rows.high), 2.0 * distance, (rows.low * rows.high).sqrt())
    middle = torch.where(rows.low > 0, middle, 0.5 * rows.high)
    return torch.where(inside, predicted, middle)


def _remember(rows: _Rows, distance: Tensor, share: Tensor, resolution: Tensor) -> None:
    """Keep the nearest violation that each row met, whatever becomes of the row."""
    nearer = (share >= 1.0 - resolution) & (distance < rows.violation)
    rows.violation = torch.where(nearer, distance, rows.violation)
    rows.violating = _pick(nearer, rows.trial, rows.violating)


def _propose(search: Search, threat: Geometry, rows: _Rows, *, momentum: Tensor) -> Tensor:
    """The next trial of every row, from its best point; marks stationary rows as done."""
    steepest = threat.steepest(rows.gradient)
    dual = threat.dual_norm(rows.gradient).clamp_min(TINY)
    slope = _dot(rows.gradient, rows.best)
    alpha = rows.alpha[..., None, None]
    beta = (MOMENTUM * momentum)[..., None, None]
    if search.epsilon is not None:
        rows.done |= (search.epsilon * dual - slope) <= STATIONARY * rows.share.abs()
        mixed = (1 - alpha) * rows.best + alpha * search.epsilon * steepest + beta * (rows.best - rows.previous)
        mixed = _pick(
            rows.projected, search.epsilon * _projected(threat, rows, rows.best / search.epsilon, steepest), mixed
        )
        # Inside the set the share may still grow outwards; go to the boundary unless the slope points inwards.
        inside = threat.distance(mixed).clamp_max(search.epsilon)
        outward = torch.where(_dot(rows.gradient, mixed) > 0, search.epsilon, inside)
        return _to_distance(threat, mixed, outward) * rows.keep
    linear = (1.0 - rows.share + slope) / dual
    rows.done |= torch.isfinite(rows.merit) & (linear > 0) & (rows.merit <= linear * (1.0 + STATIONARY))
    distance = threat.distance(rows.best).clamp_min(TINY)
    here = rows.best / distance[..., None, None]
    before = rows.previous / threat.distance(rows.previous).clamp_min(TINY)[..., None, None]
    mixed = (1 - alpha) * here + alpha * steepest + beta * (here - before)
    mixed = _pick(rows.projected, _projected(threat, rows, here, steepest), mixed)
    mixed = mixed / threat.distance(mixed).clamp_min(TINY)[..., None, None]
    along = _dot(rows.gradient, mixed)
    reach = torch.where(torch.isfinite(rows.merit), rows.merit, distance)
    radius = torch.where(along > 0, (1.0 - rows.share + slope) / along, 1.5 * reach)
    return mixed * torch.minimum(torch.maximum(radius, 0.5 * reach), 2.0 * reach)[..., None, None]


def _projected(threat: Geometry, rows: _Rows, here: Tensor, steepest: Tensor) -> Tensor:
    """Projected gradient step in the unit set: reaches faces whose interior holds the optimum, which mixing misses."""
    size = torch.linalg.vector_norm(steepest, dim=(-2, -1)) / torch.linalg.vector_norm(
        rows.gradient, dim=(-2, -1)
    ).clamp_min(TINY)
    return threat.project(here + (rows.alpha * size)[..., None, None] * rows.gradient, 1.0)


def _finished(search: Search, threat: Geometry, rows: _Rows) -> Tensor:
    if search.epsilon is not None:
        return rows.best
    distance = threat.distance(rows.best)
    return torch.where(
        torch.isfinite(rows.merit)[..., None, None],
        rows.best * (rows.merit / distance.clamp_min(TINY)).nan_to_num(1.0, 1.0, 1.0)[..., None, None],
        rows.best,
    )


def _to_distance(threat: Geometry, delta: Tensor, wanted: Tensor) -> Tensor:
    return delta * (wanted / threat.distance(delta).clamp_min(TINY))[..., None, None]


def _pick(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition[..., None, None], yes, no)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=(-2, -1))
