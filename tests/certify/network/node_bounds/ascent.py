"""Moves inside given radii that make one node's output, remainder or readout as large as ascent can."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.certify.network.node_bounds.affine import SumBound
from attnrobust.certify.network.node_bounds.elementwise import ProductBound
from attnrobust.certify.network.node_bounds.node_bound import NodeBound
from attnrobust.certify.network.node_bounds.registry import bound_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move
from attnrobust.layers.graph.elementwise import Product
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Edges, Node
from attnrobust.layers.graph.wiring import Step
from attnrobust.numerics.chance import Chance

STARTS, STEPS = 16, 15
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class NodeAt:
    """A node with its bound at clean inputs.

    Args:
        node: The node.
        inputs: Clean inputs, one or two.
        mass: Masses of their rows.
    """

    node: Node
    inputs: Edges
    mass: Tensor | None = None

    def bound(self) -> NodeBound:
        """The bound under test."""
        if self.node.arity == 2:
            return ProductBound(*self.inputs) if isinstance(self.node, Product) else SumBound()
        step = Step("node", self.node, ("input",))
        clean = NetworkGraph(int(self.inputs[0].shape[1]), (step,)).linearise(self.inputs[0], self.mass)
        return bound_of(step, clean, Chance(0, "test", 1e-10, 100))

    def change(self, *moves: Tensor) -> Tensor:
        """``f(x + e) - f(x)``."""
        moved = tuple(x + e for x, e in zip(self.inputs, moves, strict=True))
        return self.node.forward(moved, self.mass) - self.node.forward(self.inputs, self.mass)

    def remainder(self, *moves: Tensor) -> Tensor:
        """``f(x + e) - f(x) - f'(x) e``; the linear part by products with the identity, differentiable."""
        state = self.node.at(self.inputs, self.mass)
        return self.change(*moves) - _linear(state.jvp, state.vjp, moves)


def _linear(jvp: Callable[[Edges], Tensor], vjp: Callable[[Tensor], Edges], moves: Edges) -> Tensor:
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(_: object, *given: Tensor) -> Tensor:
            return jvp(given)

        @staticmethod
        def backward(_: object, gradient: Tensor) -> tuple[Tensor, ...]:
            return vjp(gradient)

    found: Tensor = Linear.apply(*moves)  # type: ignore[no-untyped-call]
    return found


def shortened(move: Tensor, within: StateMove) -> Tensor:
    """The move with every token, then the whole, scaled into the given radii."""
    lengths = torch.linalg.vector_norm(move, dim=-1, keepdim=True).clamp_min(1e-300)
    move = move * (within.tokens[:, None] / lengths).clamp_max(1.0)
    whole = torch.linalg.vector_norm(move, dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    return move * (within.frobenius / whole).clamp_max(1.0)


def largest(function: Callable[..., Tensor], measure: Measure, within: tuple[StateMove, ...]) -> float:
    """The largest measure that ascent reaches."""
    moves = [torch.randn(STARTS, *w.entries.shape, dtype=torch.float64) for w in within]
    scale = torch.logspace(-1.0, 0.3, STARTS, dtype=torch.float64)[:, None, None]
    moves = [
        shortened(e * scale * w.frobenius / torch.linalg.vector_norm(e, dim=(-2, -1), keepdim=True), w)
        for e, w in zip(moves, within, strict=True)
    ]
    best = 0.0
    for step in range(STEPS):
        moves = [e.detach().requires_grad_() for e in moves]
        value = measure(function(*moves))
        best = max(best, float(value.detach().max()))
        gradients = torch.autograd.grad(value.sum(), moves, allow_unused=True, materialize_grads=True)
        rate = 1.5 / (1.0 + 0.3 * step)
        moves = [
            shortened(
                e.detach()
                + rate * w.frobenius * g / torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).clamp_min(1e-300),
                w,
            )
            for e, g, w in zip(moves, gradients, within, strict=True)
        ]
    return best


def radii(n: int, d: int, frobenius: float, *, still: int | None = None, share: float = 1.0) -> StateMove:
    """``||E||_F <= frobenius``, tokens at most a share of it, one of them not at all."""
    tokens = torch.full((n,), frobenius * share, dtype=torch.float64)
    if still is not None and n > 1:
        tokens[still] = 0.0
    return state_move(frobenius, tokens, tokens[:, None].expand(-1, d))
