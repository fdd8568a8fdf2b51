"""Moves of all states of a network on the threat's set of one size, from node to node."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.node_bound import NodeBound
from attnrobust.certify.network.node_bounds.registry import bound_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move
from attnrobust.errors import UnsupportedModelError
from attnrobust.goals import ResolvedGoal
from attnrobust.layers.graph.activation_functions import FUNCTIONS
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.wiring import Step, Wiring
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.rounding import nonzero
from attnrobust.problem import Problem
from attnrobust.threats.moves import PerTokenBall

FLOOR = 1e-3  # of the largest: least weight of a neuron

Refine = Callable[[str, StateMove, Mapping[str, float]], StateMove]
"""State, its move from its own node, sizes of the remainders so far: a move that is no larger."""


BoundOf = Callable[[Step, Linearisation, Chance], NodeBound]
"""The bound of one step at the clean states."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network with the bound of every node at its clean states.

    Args:
        clean: Clean states and derivatives.
        bounds: One bound a step.
        profiles: Weights of the entries of a remainder that its size is measured with; none means 1.
    """

    clean: Linearisation
    bounds: Mapping[str, NodeBound]
    profiles: Mapping[str, Float[Tensor, "n e"]]

    @classmethod
    def of(cls, problem: Problem, chance: Chance, bound: BoundOf = bound_of) -> "Network":
        """The problem's network at its clean input, every node with this bound."""
        graph = graph_of(problem)
        clean = graph.linearise(problem.clean.points, problem.mass)
        return cls(clean, {step.name: bound(step, clean, chance) for step in graph.steps}, profiles(clean))

    @property
    def wiring(self) -> Wiring:
        """The network."""
        return self.clean.wiring

    def moves(self, source: StateMove, refine: Refine | None = None) -> tuple[dict[str, StateMove], dict[str, float]]:
        """Moves of every state, and weighted sizes of the remainders of the nodes that have one (if refined)."""
        moves, remainders = {self.wiring.source: source}, dict[str, float]()
        for step in self.wiring.steps:
            inputs, bound = [moves[name] for name in step.reads], self.bounds[step.name]
            moved = bound.move(*inputs)
            if refine is not None:
                if not step.node.affine:
                    remainders[step.name] = self._size(step.name, inputs)
                moved = refine(step.name, moved, remainders)
            moves[step.name] = moved
        return moves, remainders

    def _size(self, name: str, inputs: list[StateMove]) -> float:
        if name in self.profiles:
            return self.bounds[name].weighted_remainder(self.profiles[name], *inputs)
        return self.bounds[name].remainder(*inputs).frobenius


def profiles(clean: Linearisation) -> dict[str, Float[Tensor, "n e"]]:
    """Weights of the neurons of ``Affine, Activate, Affine``: large where a neuron counts for much and bends little.

    ``omega_k^2 = |out_k| / (theta_k |in_k|)`` balances ``||W_in diag(omega theta)||`` with ``||W_out / omega||``, where
    ``theta_k`` is about ``|phi''(x_k)| |in_k|``; any weights are sound.
    """
    steps = {step.name: step for step in clean.wiring.steps}
    found = {}
    for step in clean.wiring.steps:
        hidden = steps.get(step.reads[0])
        if not isinstance(step.node, Affine) or hidden is None or not isinstance(hidden.node, Activate):
            continue
        given, higher = steps.get(hidden.reads[0]), FUNCTIONS[hidden.node.function].higher
        if given is not None and isinstance(given.node, Affine):
            x = clean.clean[given.name]
            bend = torch.ones_like(x) if higher is None else _relative(higher(x)[0].abs())
            effect = _relative(torch.linalg.vector_norm(step.node.weight, dim=1))
            reach = _relative(torch.linalg.vector_norm(given.node.weight, dim=0))
            found[hidden.name] = (effect / bend).sqrt() / reach
    return found


def _relative(sizes: Tensor) -> Tensor:
    return (sizes / nonzero(sizes.max())).clamp_min(FLOOR)


def graph_of(problem: Problem) -> NetworkGraph:
    """The graph of a problem whose network is one."""
    if not isinstance(problem.network, NetworkGraph):
        raise UnsupportedModelError(f"{type(problem.network).__name__} is not a NetworkGraph")
    return problem.network


def threat_move(problem: Problem, radius: float) -> StateMove:
    """How far the input moves on the threat's set of this size."""
    n, d = problem.clean.n, problem.clean.width
    points, moves = problem.clean.points, problem.moves
    tokens = radius * moves.token_factor(n, d) * moves.movable(n).to(points)
    entry = tokens
    if isinstance(moves, PerTokenBall) and moves.norm == "linf":
        entry = radius * moves.movable(n).to(points)
    return state_move(radius * moves.frobenius_factor(n, d), tokens, entry[:, None].expand(-1, d))


def pooled_norm(goal: ResolvedGoal, move: StateMove) -> float:
    """Bound of the norm of the pooled move."""
    if goal.weights is None:
        return move.frobenius
    counted = goal.weights > 0.0
    weights = goal.weights[counted]
    by_tokens = float(weights @ move.tokens[counted])
    return min(by_tokens, float(torch.linalg.vector_norm(weights)) * move.frobenius)


def goal_changes(goal: ResolvedGoal, move: StateMove) -> Float[Tensor, "c"]:
    """Bounds of the goal's changes for a move of the output: a displacement, or what it does to every functional."""
    norm = pooled_norm(goal, move)
    if goal.functionals is None or goal.weights is None:
        return goal.budgets.new_tensor([norm])
    lengths: Tensor = torch.linalg.vector_norm(goal.functionals, dim=-1)
    counted = goal.weights > 0.0
    pooled = goal.weights[counted] @ move.entries[counted]
    by_entry = torch.nan_to_num(goal.functionals.abs() @ pooled, nan=torch.inf)
    return torch.minimum(torch.nan_to_num(lengths * norm, nan=torch.inf), by_entry)
