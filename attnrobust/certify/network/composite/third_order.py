"""The third derivative of every prefix map as one object, along pairs of directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Port, Target
from attnrobust.certify.network.composite.top_eigenvalue import Operator
from attnrobust.layers.graph.linearisation import Direction, Linearisation
from attnrobust.layers.graph.node import Edges


@dataclass(frozen=True, eq=False)
class ThirdOrder:
    """Third-order forms along given pairs, and second-order values of the pairs.

    Args:
        record: The network at its clean input.
        moves: What may move.
        pairs: Directions (a_i, b_i), (s, N) each.
    """

    record: Linearisation
    moves: Moves
    pairs: tuple[Float[Tensor, "s N"], Float[Tensor, "s N"]]

    @cached_property
    def _along(self) -> tuple[Direction, Direction]:
        first, second = (self.record.along(self.moves.tokens(part)) for part in self.pairs)
        return first, second

    def curvature(self, target: Target) -> Operator:
        """``v -> sum_i D3[a_i, b_i, .]^T D3[a_i, b_i, v]`` in the target's metric."""
        record, moves = self.record, self.moves
        first, second = self._along

        def product(v: Tensor) -> Tensor:
            other = record.along(moves.tokens(v)[:, None])
            images = {name: record.third(first, second, other, stop=name) for name in target.states}
            back = target.cotangents(target.flat(images))
            pulled = [record.third_adjoint(first, second, y, stop=name).sum(1) for name, y in back.items()]
            return moves.flat(torch.stack(pulled).sum(0))

        rows = max(int(value.numel()) for value in record.clean.values())
        return Operator(product, moves.size, 12 * rows * self.pairs[0].shape[0])

    def seconds(self, ports: Sequence[Port], rows: slice) -> dict[Port, Edges]:
        """``D2[a_i, b_i]`` of some pairs at the edges of every port that it reaches."""
        record = self.record
        first, second = (record.along(self.moves.tokens(part[rows])).features for part in self.pairs)
        sources = {name: record.nodes[name].bilinear(first[name], second[name]) for name in first}
        found = record.push(sources, sorted({name for port in ports for name in port.reads}))
        return {port: tuple(found[name] for name in port.reads) for port in ports}
