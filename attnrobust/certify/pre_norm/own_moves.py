"""What the tokens themselves take away from a margin where the block adds them to the attention's output."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.pre_norm.sphere import NormFront
from attnrobust.numerics.rounding import ENTRY, outward


@dataclass(frozen=True, eq=False)
class OwnMoves:
    """``-sum_i pi_i f.d_i <= tangential.d' + unseen z + error(r)``: docs/pre-norm-certificates.md, lemma N3.

    The norm does not see the part of a move along the token, and for LayerNorm along the ones; z is the length of
    these parts of all tokens together.

    Args:
        front: The norm.
        readout: ``-pi_i f``, 0 on tokens that may not move and everywhere if the tokens are not added.
    """

    front: NormFront
    readout: Float[Tensor, "n d"]

    @classmethod
    def of(cls, front: NormFront, weights: Float[Tensor, "n"], functional: Float[Tensor, "e"]) -> "OwnMoves":
        """Those of one functional of the pooled rows."""
        if not front.layer.residual:
            return cls(front, torch.zeros_like(front.points))
        return cls(front, -(weights * front.movable)[:, None] * functional)

    @cached_property
    def tangential(self) -> Float[Tensor, "n d"]:
        """The readout's part that the norm sees."""
        direction = self.front.direction
        centred = self.front.layer.centred(self.readout)
        return centred - (centred * direction).sum(-1, keepdim=True) * direction

    @cached_property
    def unseen(self) -> float:
        """Length of the rest, all tokens together."""
        return outward(float(torch.linalg.vector_norm(self.readout - self.tangential)), ENTRY)

    def error(self, radius: float) -> float:
        """What d' in place of the tangential parts of the moves may hide: ``r |(r / Y_i) tangential_i|``."""
        sizes = torch.linalg.vector_norm(self.tangential, dim=-1) * self.front.shares(radius)
        return outward(radius * float(torch.linalg.vector_norm(sizes)), ENTRY)
