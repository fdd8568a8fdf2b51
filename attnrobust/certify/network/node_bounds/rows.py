"""Moves of nodes that act on the rows: pooling, fixed tokens, position embeddings."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.node_bound import AffineBound
from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move


@dataclass(frozen=True, eq=False)
class PoolBound(AffineBound):
    """One row ``sum_i pi_i E_i``: at most ``sum pi_i |E_i|`` and at most ``|pi| ||E||_F``.

    Args:
        weights: pi >= 0.
    """

    weights: Float[Tensor, "n"]

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        counted = self.weights > 0.0  # 0 times an unknown (infinite) move is 0
        weights = self.weights[counted]
        tokens = (weights @ given.tokens[counted])[None]
        entries = (weights @ given.entries[counted])[None]
        return state_move(float(torch.linalg.vector_norm(weights)) * given.frobenius, tokens, entries)


@dataclass(frozen=True, eq=False)
class FixedTokensBound(AffineBound):
    """Fixed tokens before the input's do not move.

    Args:
        added: How many.
    """

    added: int

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        tokens = torch.nn.functional.pad(given.tokens, (self.added, 0))
        return state_move(given.frobenius, tokens, torch.nn.functional.pad(given.entries, (0, 0, self.added, 0)))


class IdentityBound(AffineBound):
    """A fixed offset: the move is that of the input."""

    def move(self, *inputs: StateMove) -> StateMove:
        return inputs[0]
