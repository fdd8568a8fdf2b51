"""The token-moving attack: every token keeps its mass and moves within the threat's set."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.attacks._attack import AttackMethod, Search
from attnrobust.attacks._evaluate import Evaluator
from attnrobust.attacks.drivers.projected_gradient import Start, search_rows
from attnrobust.attacks.drivers.singular_direction import margin_gradients, random_directions, singular_directions
from attnrobust.threat import AnyToken, FrobeniusBall

MIN_BRANCHES = 8
"""Tokens of "any one token" that are searched at least: the first ones in the order of their first-order radius."""
BRANCH_LANCZOS_STEPS = 8
MAX_CLASSES = 64
"""Margins that are looked at to first order; the nearest ones are attacked."""
TINY = 1e-300


class TokenMoving(AttackMethod):
    """Projected gradient ascent with restarts, from first-order optima and from random directions.

    Margins: each restart attacks one class (the nearest ones to first order); the gradient at the clean input gives the
    first start. Displacements: the leading right singular vectors of the Jacobian, with both signs. The rest is random.
    "Any one token": the tokens with the smallest first-order radii are searched, each by itself, in one batch.
    """

    name: ClassVar[str] = "token-moving"

    def propose(self, search: Search) -> Float[Tensor, "p k n d"]:
        """Search from every start; see the module ``drivers.projected_gradient``."""
        evaluator = search.evaluator
        if isinstance(search.threat, AnyToken):
            return _any_token(search)
        p, n = evaluator.points.shape[:2]
        allowed = search.threat.movable(n).to(evaluator.device).expand(p, 1, n)
        start = _starts(search, evaluator, allowed, rows=search.budget.restarts)
        return search_rows(search, evaluator, start, steps=search.budget.steps)


def _starts(search: Search, evaluator: Evaluator, allowed: Bool[Tensor, "p 1 n"], *, rows: int) -> Start:
    """First-order optima, then random directions, of one set per problem."""
    threat = search.threat
    p, n, d = evaluator.points.shape
    random = random_directions(search.generators(), rows, (n, d), evaluator.points) * allowed[..., None]
    if evaluator.goal.functionals is None:
        directions, first = _displacement_directions(evaluator, random, allowed, rows)
        targets = torch.zeros(p, rows, dtype=torch.int64, device=evaluator.device)
        # In units of the budget the singular value is the share per Frobenius length.
        radius = threat.distance(directions[:, :1]) / first[:, None].clamp_min(TINY)
    else:
        targets, gradients, radius = _nearest_classes(search, evaluator, rows)
        directions = threat.steepest(gradients)
        half = max(1, (rows + 1) // 2)
        directions[:, half:] = random[:, half:]
    directions = _replace_zero(directions, random)
    largest = radius.new_tensor(search.epsilon) if search.epsilon is not None else radius
    return Start(directions, targets, largest.expand(p, rows), allowed.expand(p, rows, n), threat)


def _displacement_directions(evaluator: Evaluator, random: Tensor, allowed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    vectors = max(1, rows // 4)
    found, values = singular_directions(evaluator, random[:, :1], allowed, count=vectors)
    top = found[:, 0]
    signed = torch.stack([top, -top], dim=2).flatten(1, 2)[:, :rows]
    return torch.cat([signed, random[:, signed.shape[1] :]], dim=1), values[:, 0, 0]


def _nearest_classes(search: Search, evaluator: Evaluator, rows: int) -> tuple[Int[Tensor, "p r"], Tensor, Tensor]:
    """Classes by first-order radius; one class per row, cycling, with its gradient and radius."""
    p, classes = evaluator.goal.budgets.shape
    order = evaluator.goal.budgets.argsort(dim=1, stable=True)[:, : min(classes, MAX_CLASSES)]
    gradients = margin_gradients(evaluator, order)
    radius = 1.0 / search.threat.dual_norm(gradients).clamp_min(TINY)
    nearest = radius.argsort(dim=1, stable=True)[:, : max(1, (rows + 1) // 2)]
    cycle = nearest[:, torch.arange(rows, device=nearest.device) % nearest.shape[1]]
    at = torch.arange(p, device=nearest.device)[:, None]
    return order[at, cycle], gradients[at, cycle], radius[at, cycle]


def _replace_zero(directions: Tensor, random: Tensor) -> Tensor:
    zero = torch.linalg.vector_norm(directions, dim=(-2, -1), keepdim=True) == 0
    return torch.where(zero, random, directions)


# ---- any one token -----------------------------------------------------------------------------------------------


def _any_token(search: Search) -> Float[Tensor, "p k n d"]:
    evaluator = search.evaluator
    start, slope = branch_starts(search, evaluator)
    p, branches = slope.shape
    count = min(branches, max(MIN_BRANCHES, search.budget.restarts))
    order = slope.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = start.take(torch.arange(p, device=slope.device), order)
    return search_rows(search, evaluator, both_signs(chosen), steps=search.budget.steps)


def both_signs(start: Start) -> Start:
    """Every row twice: along its direction and against it (the second order tells them apart)."""
    return Start(
        torch.cat([start.directions, -start.directions], dim=1),
        start.targets.repeat(1, 2),
        start.radius.repeat(1, 2),
        start.allowed.repeat(1, 2, 1),
        start.threat,
    )


def branch_starts(search: Search, evaluator: Evaluator) -> tuple[Start, Float[Tensor, "p r"]]:
    """One row per movable token, at its own first-order optimum, and the share per unit length there."""
    p, n, d = evaluator.points.shape
    tokens = search.threat.movable(n).nonzero().flatten().to(evaluator.device)
    allowed = torch.nn.functional.one_hot(tokens, n).bool().expand(p, -1, n)
    branches = tokens.numel()
    random = random_directions(search.generators(), branches, (n, d), evaluator.points) * allowed[..., None]
    if evaluator.goal.functionals is None:
        found, values = singular_directions(evaluator, random, allowed, count=1, steps=BRANCH_LANCZOS_STEPS)
        directions, slope = found[:, :, 0], values[:, :, 0]
        targets = torch.zeros(p, branches, dtype=torch.int64, device=evaluator.device)
    else:
        classes = evaluator.goal.budgets.argsort(dim=1, stable=True)[:, :MAX_CLASSES]
        gradients = margin_gradients(evaluator, classes)
        slope, best = torch.linalg.vector_norm(gradients, dim=-1)[:, :, tokens].max(dim=1)
        at = torch.arange(p, device=best.device)[:, None]
        targets = classes[at, best]
        directions = gradients[at, best] * allowed[..., None]
    directions = _replace_zero(directions, random)
    radius = 1.0 / slope.clamp_min(TINY) if search.epsilon is None else torch.full_like(slope, search.epsilon)
    return Start(directions, targets, radius, allowed, FrobeniusBall()), slope
