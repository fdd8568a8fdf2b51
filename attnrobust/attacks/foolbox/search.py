"""Our searches against any foolbox model: one input of a pipeline as a problem, and its carrier back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.mass_splitting import MAX_SPLIT, MassSplitting
from attnrobust.attacks.method import AttackBudget
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Margin
from attnrobust.numerics.transport import Order
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import FrobeniusBall, MoveThreat
from attnrobust.tokens import TokenMeasure

NUDGES = (0.0, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
"""Stretches of the moves, tried in turn, that let a violation survive the rounding to the model's dtype."""
CANDIDATES = 64
"""Copies that are evaluated in one call of the model."""


@dataclass(frozen=True)
class Wanted:
    """What a criterion asks of one input: another class than ``label``, or exactly ``target``."""

    label: int | None = None
    target: int | None = None


def wanted(criterion: Any, index: int) -> Wanted:
    """Read foolbox's ``Misclassification`` or ``TargetedMisclassification``.

    Raises:
        InputError: Another criterion; its boundary is not a margin.
    """
    for name, kind in (("labels", "label"), ("target_classes", "target")):
        classes = getattr(criterion, name, None)
        if classes is not None:
            return Wanted(**{kind: int(classes.raw[index])})
    raise InputError(
        f"criterion {type(criterion).__name__} is not supported; use Misclassification or TargetedMisclassification"
    )


@dataclass(frozen=True, eq=False)
class _ScoreMap:
    """A foolbox model as a map of tokens whose output rows are all the logits (or two scores of a targeted attack)."""

    model: Callable[[Tensor], Tensor]
    like: Float[Tensor, "slots channels"]
    total: float
    want: Wanted
    out_width: int

    @property
    def width(self) -> int:
        """Token width d."""
        return int(self.like.shape[1]) - 1

    @property
    def digest(self) -> str:
        """The model is not known by its content; seeds then depend on input, criterion and run."""
        return f"foolbox model;{self.want}"

    def carriers(self, x: Float[Tensor, "b n d"], mass: Float[Tensor, "b n"]) -> Float[Tensor, "b slots channels"]:
        """Tokens with masses that sum to 1 as carriers of the model's dtype."""
        rows = torch.cat([x, mass[..., None] * self.total], dim=-1)
        if rows.shape[1] > self.like.shape[0]:
            raise InputError(f"{rows.shape[1]} atoms do not fit into {self.like.shape[0]} slots; give more slots")
        return torch.nn.functional.pad(rows, (0, 0, 0, self.like.shape[0] - rows.shape[1])).to(self.like.dtype)

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        n = x.shape[-2]
        mass = x.new_full((n,), 1.0 / n) if mass is None else mass
        flat = x.reshape(-1, n, x.shape[-1])
        scores = self.scores(self.carriers(flat, mass.expand(x.shape[:-1]).reshape(-1, n)))
        return scores[:, None, :].expand(-1, n, -1).reshape(*x.shape[:-1], scores.shape[-1])

    def scores(self, carriers: Float[Tensor, "b slots channels"]) -> Float[Tensor, "b e"]:
        """Logits; of a targeted attack 0 and by how much the target leads."""
        logits = self.model(carriers).to(torch.float64)
        if self.want.target is None:
            return logits
        lead = _lead(logits, self.want.target)
        return torch.stack([torch.zeros_like(lead), lead], dim=-1)


class CarrierInput:
    """One input of a foolbox pipeline.

    Args:
        model: Maps carriers (B, slots, d + 1) to logits.
        clean: Its carrier (slots, d + 1).
        count: Its number of tokens.
        want: What the criterion asks.

    Raises:
        InputError: Logits that are not (B, classes >= 2).
        AlreadyViolatedError: The criterion holds at the clean input.
    """

    def __init__(self, model: Any, clean: Float[Tensor, "slots channels"], count: int, want: Wanted) -> None:
        self.model, self.clean, self.count, self.want = model, clean, count, want
        self.lower, self.upper = float(model.bounds.lower), float(model.bounds.upper)
        logits = self.logits(clean[None])
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(f"the model must give logits (B, classes >= 2); got {tuple(logits.shape)}")
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's logits at the clean input are not finite")
        if self.holds(clean):
            raise AlreadyViolatedError("the criterion holds at the clean input")
        self.classes = int(logits.shape[1])

    def logits(self, carriers: Float[Tensor, "b slots channels"]) -> Float[Tensor, "b c"]:
        """The model on token vectors within its bounds (the masses are left alone)."""
        inside = carriers[..., :-1].clamp(self.lower, self.upper)
        found: Tensor = self.model(torch.cat([inside, carriers[..., -1:]], dim=-1))
        return found

    @property
    def slots(self) -> int:
        """Slots of the carrier."""
        return int(self.clean.shape[0])

    @cached_property
    def measure(self) -> TokenMeasure:
        """The clean tokens."""
        mass = self.clean[: self.count, -1].to(torch.float64)
        return TokenMeasure(self.clean[: self.count, :-1], mass / mass.sum())

    @cached_property
    def network(self) -> _ScoreMap:
        """The model as a map of tokens."""
        total = float(self.clean[: self.count, -1].to(torch.float64).sum())
        width = self.classes if self.want.target is None else 2
        return _ScoreMap(self.logits, self.clean, total, self.want, width)

    def problem(self, threat: Threat) -> Problem:
        """The input as a margin problem."""
        scores = self.network.out_width
        eye = torch.eye(scores, dtype=torch.float64, device=self.clean.device)
        label = 0 if self.want.label is None else self.want.label
        return Problem(self.network, self.measure, threat, Margin(eye, label=label))

    def leads(self, carriers: Float[Tensor, "b slots channels"]) -> Float[Tensor, "b"]:
        """How clearly the criterion holds: positive where it does."""
        logits = self.logits(carriers).to(torch.float64)
        if self.want.target is not None:
            return _lead(logits, self.want.target)
        return -_lead(logits, self.want.label or 0)

    def holds(self, carrier: Float[Tensor, "slots channels"]) -> bool:
        """Whether the criterion holds, as foolbox decides it; never at logits that are not finite."""
        logits = self.logits(carrier[None])[0]
        winner = int(logits.argmax())
        reached = winner == self.want.target if self.want.target is not None else winner != self.want.label
        return bool(torch.isfinite(logits).all()) and reached

    def carrier(
        self, points: Float[Tensor, "m d"], mass: Float[Tensor, "m"] | None = None
    ) -> Float[Tensor, "slots channels"]:
        """Atoms as a float64 carrier; without masses they are those of the clean tokens."""
        row = self.clean.to(torch.float64).clone()
        row[: points.shape[0], :-1] = points
        if mass is not None:
            row[: mass.shape[0], -1] = mass
        return row

    def settle(self, found: Float[Tensor, "slots channels"]) -> Float[Tensor, "slots channels"]:
        """The found carrier in the inputs' dtype and bounds, stretched a little where rounding undid the violation."""
        anchors = self.anchors(found)
        settled = found
        for nudge in NUDGES:
            points = (found[:, :-1] + nudge * (found[:, :-1] - anchors)).clamp(self.lower, self.upper)
            settled = torch.cat([points, found[:, -1:]], dim=-1).to(self.clean.dtype)
            if self.holds(settled):
                break
        return settled

    def anchors(self, found: Float[Tensor, "slots channels"]) -> Float[Tensor, "slots d"]:
        """Where each slot came from: its own clean token, or the nearest one of a filled slot."""
        clean = self.clean[:, :-1].to(torch.float64)
        anchors = clean.clone()
        if bool((found[self.count :, -1] > 0).any()):
            nearest = torch.cdist(found[self.count :, :-1], clean[: self.count]).argmin(dim=1)
            anchors[self.count :] = torch.where(found[self.count :, -1:] > 0, clean[nearest], anchors[self.count :])
        return anchors


def moved(row: CarrierInput, threat: MoveThreat, *, budget: AttackBudget, seed: int) -> Tensor | None:
    """The nearest violation that token moving finds."""
    (result,) = TokenMoving().run([row.problem(threat)], epsilon=None, seed=seed, budget=budget)
    return None if result.perturbed is None else row.carrier(result.perturbed)


def split(
    row: CarrierInput, order: Order, *, domain_radius: float | None, budget: AttackBudget, seed: int
) -> Tensor | None:
    """The nearest measure that mass splitting finds within the slots."""
    tokens = _most_sensitive(row.problem(FrobeniusBall()))[: min(MAX_SPLIT, row.slots - row.count)]
    problem = row.problem(CouplingBall(order, domain_radius=domain_radius))
    (result,) = MassSplitting(tokens=tokens).run([problem], epsilon=None, seed=seed, budget=budget)
    if result.atoms is None:
        return None
    total, n = row.network.total, row.count
    mass = (result.atoms.mass * total).to(row.clean.dtype)
    parents = row.clean[:n, -1][result.atoms.parent]
    # The children of a token carry exactly its mass after rounding: the later ones as rounded, the first one the rest.
    mass = torch.where(torch.arange(mass.shape[0], device=mass.device) < n, parents, parents - (parents - mass))
    mass[:n] = row.clean[:n, -1].index_add(0, result.atoms.parent[n:], -mass[n:])
    kept = mass > 0
    if not bool(kept[:n].all()):
        return None
    return row.carrier(result.atoms.points[kept], mass[kept].to(torch.float64))


def duplicated(
    row: CarrierInput, copies: int, *, move_epsilon: float, budget: AttackBudget, seed: int
) -> Tensor | None:
    """Copies into empty slots, each the one that helps most, until the criterion holds; then moves within a budget."""
    best = row.clean.to(torch.float64).clone()
    count = row.count
    for slot in range(count, min(row.slots, count + copies)):
        candidates = best.expand(count, -1, -1).clone()
        candidates[:, slot] = best[:count]
        leads = torch.cat([row.leads(part.to(row.clean.dtype)) for part in candidates.split(CANDIDATES)])
        best = candidates[int(leads.nan_to_num(-torch.inf).argmax())]
        if row.holds(best.to(row.clean.dtype)):
            return best
    if move_epsilon == 0.0:
        return best
    filled = CarrierInput(row.model, best.to(row.clean.dtype), int((best[:, -1] > 0).sum()), row.want)
    problem = filled.problem(FrobeniusBall())
    (result,) = TokenMoving().run([problem], epsilon=move_epsilon, seed=seed, budget=budget)
    return best if result.perturbed is None else filled.carrier(result.perturbed)


def _most_sensitive(problem: Problem) -> list[int]:
    """Tokens in the order of the slope of the margin."""
    with torch.enable_grad():
        moves = torch.zeros_like(problem.clean.points).requires_grad_(True)
        (slope,) = torch.autograd.grad(problem.usage(moves), moves)
    order: list[int] = torch.linalg.vector_norm(slope, dim=1).argsort(descending=True, stable=True).tolist()
    return order


def _lead(logits: Float[Tensor, "b c"], label: int) -> Float[Tensor, "b"]:
    """By how much a class leads all others."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    lead: Tensor = logits[:, label] - others.amax(dim=1)
    return lead
