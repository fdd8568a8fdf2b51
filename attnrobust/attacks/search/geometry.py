"""What a search needs to know of a threat, and the set whose rows share one sum of lengths."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.projections import shortened

TINY = 1e-300


@runtime_checkable
class Geometry(Protocol):
    """A norm ball on perturbations; every threat is one (see ``attnrobust.threats.moves.Threat``)."""

    def distance(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """The norm."""

    def project(self, delta: Float[Tensor, "*b n d"], epsilon: Float[Tensor, "*b"] | float) -> Float[Tensor, "*b n d"]:
        """Nearest point of the ball."""

    def steepest(self, gradient: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """Maximiser of ``<gradient, D>`` over the unit ball."""

    def dual_norm(self, gradient: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Its value."""


class SumBall:
    """``sum_i |D_i| <= epsilon``: the set behind W_1 couplings. Its extreme points move one row."""

    def distance(self, delta: Tensor) -> Tensor:
        """Sum of the row lengths."""
        return _lengths(delta).sum(dim=-1)

    def project(self, delta: Tensor, epsilon: Tensor | float) -> Tensor:
        """All row lengths drop by one amount (projection of the lengths onto the l1 ball)."""
        length = _lengths(delta)
        budget = torch.as_tensor(epsilon, dtype=delta.dtype, device=delta.device)[..., None]
        kept = shortened(length, budget)
        shorter: Tensor = delta * (kept / length.clamp_min(TINY))[..., None]
        return shorter

    def steepest(self, gradient: Tensor) -> Tensor:
        """The row with the longest gradient moves alone."""
        length = _lengths(gradient)
        keep = torch.nn.functional.one_hot(length.argmax(dim=-1), gradient.shape[-2]).to(gradient.dtype)
        return gradient * keep[..., None] / length.amax(dim=-1)[..., None, None].clamp_min(TINY)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """Longest row of the gradient."""
        return _lengths(gradient).amax(dim=-1)


def _lengths(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return length
