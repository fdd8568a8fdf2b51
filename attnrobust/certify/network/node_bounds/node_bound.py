"""What a certificate of a whole network asks of one node at its clean input."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.state_move import StateMove, no_move


class NodeBound(ABC):
    """Bounds of one node f at clean inputs x, for moves e of its inputs of which ``StateMove`` is known, one an edge.

    ``move`` is about ``f(x + e) - f(x)``, ``remainder`` about ``f(x + e) - f(x) - f'(x) e``; both hold for every e
    that the given bounds allow.
    """

    @abstractmethod
    def move(self, *inputs: StateMove) -> StateMove:
        """Bounds of ``f(x + e) - f(x)``."""

    @abstractmethod
    def remainder(self, *inputs: StateMove) -> StateMove:
        """Bounds of ``f(x + e) - f(x) - f'(x) e``."""

    def weighted_remainder(self, weights: Float[Tensor, "n e"], *inputs: StateMove) -> float:
        """Bound of ``||(f(x + e) - f(x) - f'(x) e) * weights||_F``, entry by entry."""
        found = self.remainder(*inputs)
        if found.frobenius == 0.0:
            return 0.0
        by_entry = float(torch.linalg.vector_norm(found.entries * weights))
        return min(float(weights.max()) * found.frobenius, by_entry if by_entry >= 0.0 else math.inf)

    def readout(self, cotangents: Float[Tensor, "c n e"], *inputs: StateMove) -> Float[Tensor, "c"]:
        """Upper bounds of ``|<cotangents_c, f(x + e) - f(x) - f'(x) e>|``; unless overridden, by Cauchy-Schwarz."""
        return readout_of(cotangents, self.remainder(*inputs))


class AffineBound(NodeBound):
    """A node without remainder."""

    def remainder(self, *inputs: StateMove) -> StateMove:
        return no_move(self.move(*inputs).entries)

    def readout(self, cotangents: Tensor, *inputs: StateMove) -> Tensor:
        return torch.zeros_like(cotangents[:, 0, 0])


def readout_of(cotangents: Float[Tensor, "c n e"], move: StateMove) -> Float[Tensor, "c"]:
    """Upper bounds of ``|<cotangents_c, E>|`` for a move E: whole by whole, token by token, entry by entry."""
    per_token = torch.linalg.vector_norm(cotangents, dim=-1)
    bounds = (
        torch.linalg.vector_norm(per_token, dim=-1) * move.frobenius,
        per_token @ move.tokens,
        (cotangents.abs() * move.entries).sum(dim=(-2, -1)),
    )
    smallest: Tensor = torch.stack([torch.nan_to_num(bound, nan=torch.inf) for bound in bounds]).amin(dim=0)
    return smallest
