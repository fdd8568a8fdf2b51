"""Half the second derivative of every node between remainders, as one object with what comes after it.

``Y_{m->l} 1/2 f_m''[R, R]`` is bounded by ``kappa_m |R|^2 / 2`` with
``kappa_m = sup_{|v| = 1} ||S_l Y_{m->l} f_m''[S_m^{-1} ., S_m^{-1} v]||_F``; all nodes before a target in one
eigenvalue: docs/network-composite.md, lemma 11.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.targets import Port, Readout, Target
from attnrobust.certify.network.composite.top_eigenvalue import Operator
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions
from attnrobust.numerics.rounding import SMALLEST

APART: tuple[type[Node], ...] = (Affine, Scale, Sum, AddPositions, Normalise, Activate, Product)
"""Nodes that act on every token by itself and keep its place."""
ROUNDS = 3  # of power iteration, for guesses of the norms; any positive guesses are sound


@dataclass(frozen=True, eq=False)
class QuadraticForms:
    """The second derivatives of some nodes, from remainders at their ports to one target.

    Args:
        record: The network at its clean input.
        target: Where they are measured.
        sources: Ports of the nodes.
        along: Directions of all ports stacked, in their metrics, (s, N); those of different ports are independent.
    """

    record: Linearisation
    target: Target
    sources: Sequence[Port]
    along: Float[Tensor, "s N"]

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in each port."""
        return [port.size for port in self.sources]

    @cached_property
    def _mine(self) -> Mapping[str, Any]:
        return self._features(self.along)

    def _features(self, flat: Tensor) -> dict[str, Any]:
        parts = zip(self.sources, flat.split(self.sizes, dim=-1), strict=True)
        return {port.name: self.record.nodes[port.name].features(port.edges(part)) for port, part in parts}

    def product(self, v: Float[Tensor, "b N"]) -> Float[Tensor, "b N"]:
        """``v -> sum_i B[a_i, .]^T B[a_i, v]`` with ``B[a, v] = sum_m S_l Y f_m''[a_m, v_m]``."""
        nodes, mine, other = self.record.nodes, self._mine, self._features(v[:, None])
        sources = {name: nodes[name].bilinear(mine[name], other[name]) for name in mine}
        image = self.target.flat(self.record.push(sources, self.target.states))
        back = self.record.pull(self.target.cotangents(image), list(mine))
        parts = [port.flat_cotangent(nodes[port.name].bilinear_adjoint(mine[port.name], back[port.name])).sum(1)
                 for port in self.sources]  # fmt: skip
        return torch.cat(parts, dim=-1)

    def guesses(self, start: Float[Tensor, "N"]) -> list[float]:
        """Rough norms kappa_m, by power iteration port by port."""
        parts = list(start.split(self.sizes))
        for _ in range(ROUNDS):
            unit = [part / torch.linalg.vector_norm(part).clamp_min(SMALLEST) for part in parts]
            parts = list(self.product(torch.cat(unit)[None])[0].split(self.sizes))
        roots = torch.stack([torch.linalg.vector_norm(part).sqrt() for part in parts])
        floor = 1e-6 * roots.amax() + SMALLEST
        return [float(root) for root in torch.maximum(roots, floor)]

    def weighed(self, guesses: Sequence[float]) -> Operator:
        """The product with v_m divided by its guess: where all are right, every port has the same norm."""
        root = torch.cat([
            torch.full((size,), 1.0 / guess, dtype=self.along.dtype, device=self.along.device)
            for size, guess in zip(self.sizes, guesses, strict=True)
        ])  # fmt: skip
        rows = max(int(value.numel()) for value in self.record.clean.values())
        return Operator(lambda v: root * self.product(root * v), sum(self.sizes), 4 * rows * self.along.shape[0])


def token_wise(record: Linearisation, port: Port, target: Target) -> bool:
    """Whether what a node does to one token stays in this token up to the target."""
    if isinstance(target, Readout) and target.weights is not None:
        return False
    places = {step.name: place for place, step in enumerate(record.wiring.steps)}
    last = max(places.get(name, -1) for name in target.states)
    between = record.wiring.steps[places[port.name] : last + 1]
    return all(type(step.node) in APART for step in between)


def token_basis(port: Port, device: torch.device) -> Float[Tensor, "s N"]:
    """Every coordinate of a token, in all tokens at once: a basis where tokens stay apart (lemma 11)."""
    widths = [scale.shape[-1] for scale in port.scales]
    unit = torch.eye(sum(widths), dtype=torch.float64, device=device)
    parts = zip(unit.split(widths, dim=1), port.scales, strict=True)
    return torch.cat([part[:, None].expand(-1, scale.shape[0], -1).flatten(1) for part, scale in parts], dim=1)
