"""Ways of writing an input as atoms, and searches over them whose norm is the coupling cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import expanded_problem
from attnrobust.attacks.method import Search, Work, input_seed
from attnrobust.attacks.search.evaluate import Evaluator, into_ball
from attnrobust.attacks.search.geometry import Geometry, SumBall
from attnrobust.numerics.transport import Order
from attnrobust.problem import Problem
from attnrobust.threats.measures import MeasureThreat
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from attnrobust.tokens import PerturbedTokens

NEAR_FRACTIONS = (0.5, 0.1)
JOURNEYS = (2.0, 1.4, 1.2, 1.0, 0.7, 0.35)
"""Default shares of a token's mass that leave it: equal halves, a tenth, and the masses that can afford to travel these
multiples of the tokens' spread."""
SMALLEST_FRACTION = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """One way of writing the input as atoms: the first n are the tokens, the others their second children.

    Args:
        problem: The expanded question.
        parent: Parent of each atom, (m,).
        mass: Mass of each atom, (m,).
        scale: Atom moves are the search's variables times these, (m,): the coupling cost becomes a plain norm.
        domain_radius: The atoms stay in the ball of this radius; None means all of space.
    """

    problem: Problem
    parent: Int[Tensor, "m"]
    mass: Float[Tensor, "m"]
    scale: Float[Tensor, "m"]
    domain_radius: float | None

    @classmethod
    def of(cls, problem: Problem, threat: MeasureThreat, chosen: Sequence[int], fraction: float) -> "Split":
        """Every token, and a second child with this share of the mass for the chosen ones."""
        clean = problem.clean
        n, device = clean.n, clean.points.device
        second = torch.tensor(list(chosen), dtype=torch.int64, device=device)
        parent = torch.cat([torch.arange(n, device=device), second])
        mass = clean.mass[parent].clone()
        mass[n:] *= fraction
        mass[list(chosen)] *= 1.0 - fraction
        movable = threat.movable(n).to(device)[parent]
        expanded = expanded_problem(
            problem, parent, mass, row_scale=(mass * n).sqrt(), movable=tuple(movable.nonzero().flatten().tolist())
        )
        power = {1.0: -1.0, 2.0: -0.5}.get(float(threat.order), 0.0)
        return cls(problem=expanded, parent=parent, mass=mass, scale=mass**power, domain_radius=threat.domain_radius)

    def atoms(self, variables: Float[Tensor, "k m d"]) -> list[PerturbedTokens]:
        """Search points as atoms; what is not finite is dropped."""
        finite = variables[torch.isfinite(variables).flatten(1).all(dim=1)]
        placed = into_ball(self.problem.clean.points + finite * self.scale[:, None], self.domain_radius)
        return [PerturbedTokens(points, self.mass, self.parent) for points in placed]


def search_over(splits: Sequence[Split], order: Order, work: Work, *, seed: int, attack: str) -> Search:
    """A search over ways of writing one input; all have the same number of atoms."""
    evaluator = Evaluator(
        [s.problem for s in splits],
        memory_bytes=work.budget.memory_bytes,
        scale=torch.stack([s.scale for s in splits]),
        domain_radius=splits[0].domain_radius,
    )
    evaluator.limit = work.budget.queries
    return Search(
        evaluator=evaluator,
        threat=_geometry(order),
        epsilon=work.epsilon,
        seeds=tuple(input_seed(seed, str(i), attack) for i in range(len(splits))),
        budget=work.budget,
        deadline=work.deadline,
    )


def _geometry(order: Order) -> Geometry:
    """The plain norm that the coupling cost becomes."""
    if math.isinf(order):
        return PerTokenBall()
    return FrobeniusBall() if order == 2 else SumBall()


def default_fractions(problem: Problem, order: Order, budget: float) -> tuple[float, ...]:
    """Halves, a tenth, and what the budget can send on long journeys: ``mass |journey|^p = budget^p``."""
    clean = problem.clean
    if math.isinf(order):
        return (*NEAR_FRACTIONS, 1e-2, 1e-3)
    center = clean.mass @ clean.points
    spread = float(torch.linalg.vector_norm(clean.points - center, dim=-1).max())
    if not (math.isfinite(budget) and spread > 0):
        return NEAR_FRACTIONS
    far = [(budget / (spread * journey)) ** float(order) * clean.n for journey in JOURNEYS]
    return (*NEAR_FRACTIONS, *(f for f in far if SMALLEST_FRACTION < f < NEAR_FRACTIONS[-1]))
