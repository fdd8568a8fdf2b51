"""Masses and positions of atoms refined together."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import expand_layer, goal_row
from attnrobust.attacks.measures.expand_graph import pools
from attnrobust.attacks.search.evaluate import into_ball
from attnrobust.numerics.transport import Order, coupling_cost
from attnrobust.problem import Problem, TokenMap
from attnrobust.tokens import PerturbedTokens

LEARNING_RATE = 0.1
"""First Adam step: log-masses change by about this, positions by this share of the budget."""
SNAPSHOTS = 3
TINY = 1e-300


def refine_masses(
    problem: Problem, atoms: PerturbedTokens, *, order: Order, steps: int, domain_radius: float | None = None
) -> tuple[list[PerturbedTokens], int]:
    """Ascend the used budget at a fixed coupling cost over log-masses and moves (Adam, gradients by autograd).

    Children of a token keep its total mass (softmax over its children); the moves are rescaled to the first cost at
    every step, so only their directions and proportions are free.

    Args:
        problem: The question about the clean input.
        atoms: Where to start.
        order: p of the coupling cost.
        steps: Adam steps.
        domain_radius: The atoms stay in the ball of this radius; None means all of space.

    Returns:
        The best configurations met, best last, and the forward evaluations spent.
    """
    clean = problem.clean
    cost = float(coupling_cost(atoms.displacement(clean), atoms.mass, order=order))
    if not (math.isfinite(cost) and cost > 0):
        return [], 0
    movable = problem.threat.movable(clean.n).to(atoms.parent.device)[atoms.parent]
    moves = atoms.displacement(clean) / cost
    logits = atoms.mass.log().clone()
    layer = expand_layer(problem.network, atoms.parent, clean.n)
    best: list[tuple[float, PerturbedTokens]] = []
    with torch.enable_grad():
        moves, logits = moves.clone().requires_grad_(True), logits.requires_grad_(True)
        optimiser = torch.optim.Adam([moves, logits], lr=LEARNING_RATE)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            mass = _masses(logits, atoms.parent, clean.mass)
            kept = moves * movable[:, None]
            points = clean.points[atoms.parent] + kept * cost / coupling_cost(kept, mass, order=order).clamp_min(TINY)
            points = into_ball(points, domain_radius)
            used = _usage(problem, layer, atoms.parent, mass, points)
            if not bool(torch.isfinite(used.detach())):
                break
            best.append((float(used.detach()), PerturbedTokens(points.detach(), mass.detach(), atoms.parent)))
            optimiser.zero_grad()
            (-used).backward(inputs=[moves, logits])
            optimiser.step()
    best.sort(key=lambda pair: pair[0])
    return [point for _, point in best[-SNAPSHOTS:]], len(best)


def _masses(logits: Tensor, parent: Int[Tensor, "m"], total: Float[Tensor, "n"]) -> Float[Tensor, "m"]:
    largest = torch.full_like(total, -math.inf).scatter_reduce(0, parent, logits.detach(), "amax")
    weight = (logits - largest[parent]).exp()
    return total[parent] * weight / torch.zeros_like(total).index_add(0, parent, weight)[parent]


def _usage(problem: Problem, layer: TokenMap, parent: Tensor, mass: Tensor, points: Tensor) -> Tensor:
    """Used budget, rows compared along the coupling (the search's surrogate; results are verified by transport)."""
    output, goal, row = layer(points, mass), problem.resolved, goal_row(problem)
    if pools(problem.network):
        return goal.usage(output)
    if goal.weights is None:
        squares = ((output - goal.clean[parent]) ** 2).sum(dim=-1)
        rooted: Tensor = (problem.clean.n * (mass * squares).sum()).sqrt() / goal.violated_at[0]
        return rooted
    pooled = mass @ output if row is None else output[(parent == row).nonzero()[0, 0]]
    difference = pooled - goal.clean
    if goal.functionals is None:
        length: Tensor = torch.linalg.vector_norm(difference)
        return length / goal.violated_at[0]
    return (-(goal.functionals @ difference) / goal.violated_at).amax()
