"""How far normalised tokens move: docs/pre-norm-certificates.md, lemmas N1 and N2.

With z the (centred) token, ``y = (z, sqrt(d eps))``, Y = |y|, the normalised token before weight and bias is
``sqrt(d)`` times the first d coordinates of y/Y. A move of length at most r < Y turns y by an angle of at most
``asin(r / Y)``.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.numerics.rounding import ENTRY, SMALLEST, outward

LEAST_SHRINK = 1e-6
"""Smallest factor along a token itself; any positive one is sound."""


@dataclass(frozen=True, eq=False)
class NormFront:
    """The norm in front of attention at one clean input.

    Args:
        layer: The layer.
        points: Clean hidden states.
        movable: Which of them may move; at least one.
    """

    layer: PreNormAttention
    points: Float[Tensor, "n d"]
    movable: Bool[Tensor, "n"]

    @cached_property
    def lengths(self) -> Float[Tensor, "n"]:
        """Y of every token, rounded down."""
        return -outward(-self.layer.length(self.points), ENTRY)

    @cached_property
    def steepest(self) -> float:
        """Largest ``sqrt(d) / Y`` of a movable token: the largest slope of the norm at the clean tokens."""
        return outward(math.sqrt(self.layer.width) / float(self.lengths[self.movable].min()), ENTRY)

    @cached_property
    def relative(self) -> Float[Tensor, "n"]:
        """``sqrt(d) / Y`` as a share of the largest of a movable token; 0 of the others."""
        share = outward(math.sqrt(self.layer.width) / self.lengths / self.steepest, ENTRY)
        return torch.where(self.movable, share, 0.0)

    @cached_property
    def direction(self) -> Float[Tensor, "n d"]:
        """``z / |z|``; 0 where z is 0. Centred twice: of a z that is all rounding the first mean leaves a part."""
        centred = self.layer.centred(self.layer.centred(self.points))
        unit: Tensor = centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp_min(SMALLEST)
        return unit

    @cached_property
    def flatness(self) -> Float[Tensor, "n"]:
        """``d eps / Y^2``: how much of a move along the token itself is left by eps."""
        return outward(self.layer.width * self.layer.norm.eps / self.lengths.square(), ENTRY)

    def shares(self, radius: float) -> Float[Tensor, "n"]:
        """``r / Y`` of the movable tokens, 0 of the others."""
        return torch.where(self.movable, outward(radius / self.lengths, ENTRY), 0.0)

    def covers(self, radius: float) -> bool:
        """Whether the lemmas speak about moves of this length: below every Y."""
        return float(self.shares(radius).max()) < 1.0

    def steepness(self, radius: float) -> float:
        """Lemma N1: a factor c with ``|e_i| <= relative_i c |d_i|`` for all moves of at most this length."""
        if not self.covers(radius):
            return math.inf
        share = float(self.shares(radius).max())
        chord = 2.0 * math.sin(0.5 * math.asin(share)) / share if share > 0.0 else 1.0  # rises with the share
        return outward(self.steepest * chord, ENTRY)

    def along(self, radius: float) -> Float[Tensor, "n"]:
        """Lemma N2: the normalised token moves along itself by at most this times ``sqrt(d) |d_i| / Y``."""
        share = self.shares(radius)
        half = share / (1.0 + (1.0 - share.square()).sqrt())  # tan(asin(t) / 2)
        return outward(half + self.flatness / (1.0 - share), ENTRY)


@dataclass(frozen=True, eq=False)
class Ellipsoids:
    """Lemma N2: ``e = T d'`` with ``T_i = relative_i (C - (1 - b_i) n_i n_i^T)`` and ``|d'| <= reach(r)`` on the ball.

    C centres tokens for LayerNorm and is 1 for RMSNorm, n is the token's own direction, ``b`` any positive factor.

    Args:
        front: The norm.
        shrink: b of every token.
    """

    front: NormFront
    shrink: Float[Tensor, "n"]

    @classmethod
    def near(cls, front: NormFront, radius: float) -> "Ellipsoids":
        """Those that are about the smallest ones around the image of the ball of this radius."""
        share = min(radius, 0.5 * float(front.lengths[front.movable].min()))
        return cls(front, front.along(share).sqrt().clamp(LEAST_SHRINK, 1.0))

    def apply(self, moves: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """``T d'``; T is symmetric."""
        direction, relative = self.front.direction.to(moves), self.front.relative.to(moves)
        along = (moves * direction).sum(-1, keepdim=True) * (1.0 - self.shrink).to(moves)[:, None]
        return (self.front.layer.centred(moves) - along * direction) * relative[:, None]

    def reach(self, radius: float, *, free: bool = False) -> float:
        """How long d' may be, all tokens together, where the tokens move by at most the radius together.

        Args:
            radius: Of the Frobenius ball.
            free: Whether d' and the parts of the moves that the norm does not see, times ``steepest``, are meant.
        """
        front = self.front
        if not front.covers(radius):
            return math.inf
        tangential = (1.0 - front.shares(radius)).reciprocal().square() if free else torch.ones_like(front.lengths)
        square = tangential + (front.along(radius) / self.shrink).square()
        return outward(front.steepest * radius * math.sqrt(float(square[front.movable].max())), ENTRY)
