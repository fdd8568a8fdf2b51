"""What the tests that attack bounds share: random numbers, moves on a boundary, ascent, the largest ratio."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnrobust.certify.method import PreparedBound
from attnrobust.problem import Problem


class Draw:
    """A seeded stream of numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def between(self, low: float, high: float) -> float:
        return float(low + (high - low) * torch.rand(1, generator=self.generator))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))


def boundary_moves(problem: Problem, radius: float, count: int, draw: Draw) -> Tensor:
    """Moves on the boundary of the set, a quarter of them concentrated on one token."""
    x = problem.clean.points
    moves = draw.normal(count, *x.shape)
    for row in range(count // 4):
        keep = torch.zeros(x.shape[0], 1, dtype=x.dtype)
        keep[draw.integer(0, x.shape[0] - 1)] = 1.0
        moves[row] *= keep
    moves = moves * problem.threat.movable(x.shape[0])[:, None]
    moves[moves.flatten(1).norm(dim=1) == 0] = (
        problem.threat.movable(x.shape[0])[:, None].to(x.dtype).expand_as(x).clone()
    )
    # far outside, yet not so far that the projection onto a small l1 ball is lost in rounding
    return problem.moves.project(1e6 * min(1.0, radius) * moves, radius)


def largest_usage(problem: Problem, radius: float, draw: Draw, *, steps: int, count: int = 12) -> float:
    """Largest used share of the budget that random moves and projected ascent reach at this radius.

    Steps shrink from the size of the set; half of the moves also jump to the best one to first order now and then.
    """
    n, d = problem.clean.points.shape
    movable = problem.threat.movable(n)[:, None]
    size = radius * problem.moves.frobenius_factor(n, d)
    jumps = (torch.arange(count) % 2 == 0)[:, None, None]
    move, worst = boundary_moves(problem, radius, count, draw), -math.inf
    for step in range(steps):
        move = move.clone().requires_grad_(True)
        used = problem.usage(move)
        assert torch.isfinite(used).all()
        worst = max(worst, float(used.detach().max()))
        slope = torch.autograd.grad(used.sum(), move)[0] * movable
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
        towards = move.detach() + size * (1.0 - 0.97 * step / steps) * slope / length
        if step % 3 == 0:
            towards = torch.where(jumps, radius * problem.moves.steepest(slope), towards)
        move = problem.moves.project(towards, radius)
    return worst


def finite_bound(bound: PreparedBound, radius: float, *, smallest: float) -> tuple[float, float]:
    """The radius, or a smaller one where the bound is finite (logit changes stay in the exponents), and the bound."""
    used = bound.usage(radius).value
    while used == math.inf and radius > smallest:
        radius *= 0.2
        used = bound.usage(radius).value
    return radius, used


@dataclass
class Tally:
    """How many attacks were run against the bounds of each name, and the largest of reached over bound."""

    attacks: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ratio: float, *, seed: int) -> None:
        """Count one attack; a ratio above 1 is a counterexample."""
        self.attacks[name] += 1
        self.largest[name] = max(ratio, self.largest.get(name, -math.inf))
        assert ratio <= 1.0, f"seed {seed}: {name} reached {ratio!r} of its bound"

    def __str__(self) -> str:
        rows = [f"{name:40} {self.attacks[name]:6} {self.largest[name]:.9f}" for name in sorted(self.largest)]
        total = f"{'all':40} {self.attacks.total():6} {max(self.largest.values(), default=math.nan):.9f}"
        return "\n".join([f"{'largest of reached over bound':40} attacks", *rows, total])
