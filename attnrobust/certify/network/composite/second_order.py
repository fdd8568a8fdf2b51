"""The second derivative of every prefix map as one object, and the cross terms with a remainder at every node.

With tangents T_m of the input at what node m reads and ``Y_{m->l}`` from its output to the target l,
``D2_l[a, v] = sum_m Y_{m->l} f_m''[T_m a, T_m v]`` and ``cross_l[a, R] = sum_m Y_{m->l} f_m''[T_m a, R_m]``. Both are
handled by their products with v or R, all directions a of a sketch at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.network.composite.targets import Port, Target, added
from attnrobust.certify.network.composite.top_eigenvalue import Operator
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.node import Edges


@dataclass(frozen=True, eq=False)
class Moves:
    """The moves of an input: the tokens that may move, flattened to vectors (N,).

    Args:
        movable: Which tokens move.
        width: Numbers per token.
    """

    movable: Bool[Tensor, "n"]
    width: int

    @property
    def size(self) -> int:
        """N."""
        return int(self.movable.sum()) * self.width

    def tokens(self, flat: Float[Tensor, "*b N"]) -> Float[Tensor, "*b n d"]:
        """A move of all tokens, zero where they do not move."""
        out = flat.new_zeros(*flat.shape[:-1], self.movable.numel(), self.width)
        out[..., self.movable, :] = flat.unflatten(-1, (-1, self.width))
        return out

    def flat(self, tokens: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b N"]:
        """The transpose of ``tokens``."""
        return tokens[..., self.movable, :].flatten(-2)


@dataclass(frozen=True, eq=False)
class SecondOrder:
    """Second-order forms along given directions.

    Args:
        record: The network at its clean input.
        moves: What may move.
        ports: Of every curved node, in order.
        along: Directions a_i, (s, N).
    """

    record: Linearisation
    moves: Moves
    ports: Sequence[Port]
    along: Float[Tensor, "s N"]

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        return self.record.along(self.moves.tokens(self.along)).features

    @cached_property
    def _place(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.record.wiring.names)}

    def upstream(self, target: Target) -> list[Port]:
        """The ports of nodes that are evaluated before the target and that the input reaches."""
        last = max(self._place[name] for name in target.states)
        return [port for port in self.ports if self._place[port.name] <= last and port.name in self._features]

    def _weight(self, target: Target) -> int:
        """Rough size of one product: the numbers that every direction holds at once."""
        rows = max(int(self.record.clean[name].numel()) for name in self._place)
        return 4 * rows * self.along.shape[0]

    def curvature(self, target: Target) -> Operator:
        """``v -> sum_i D2[a_i, .]^T D2[a_i, v]`` in the target's metric."""
        ports = self.upstream(target)

        def product(v: Tensor) -> Tensor:
            other = self.record.along(self.moves.tokens(v)[:, None], stop=_last(target, self._place)).features
            back = self._gram(target, ports, other)
            reads = added(
                [name for port in ports for name in port.reads], [edge.sum(1) for port in ports for edge in back[port]]
            )
            source = self.record.wiring.source
            return self.moves.flat(self.record.pull(reads, (source,))[source])

        return Operator(product, self.moves.size, self._weight(target))

    def cross(self, target: Target, sources: Sequence[Port]) -> Operator:
        """``R -> sum_i cross[a_i, .]^T cross[a_i, R]``, R stacked over the sources in their metrics."""
        sizes = [port.size for port in sources]

        def product(v: Tensor) -> Tensor:
            parts = v[:, None].split(sizes, dim=-1)
            other = {
                port.name: self.record.nodes[port.name].features(port.edges(part))
                for port, part in zip(sources, parts, strict=True)
            }
            back = self._gram(target, sources, other)
            return torch.cat([port.flat_cotangent(back[port]).sum(1) for port in sources], dim=-1)

        return Operator(product, sum(sizes), self._weight(target))

    def _gram(self, target: Target, ports: Sequence[Port], other: Mapping[str, Any]) -> dict[Port, Edges]:
        """Of every port the cotangent of what meets a_i there, for the form along a_i applied to ``other``."""
        nodes, mine = self.record.nodes, self._features
        sources = {p.name: nodes[p.name].bilinear(mine[p.name], other[p.name]) for p in ports}
        image = target.flat(self.record.push(sources, target.states))
        cotangents = self.record.pull(target.cotangents(image), [port.name for port in ports])
        return {p: nodes[p.name].bilinear_adjoint(mine[p.name], cotangents[p.name]) for p in ports}


def _last(target: Target, place: Mapping[str, int]) -> str:
    return max(target.states, key=place.__getitem__)
