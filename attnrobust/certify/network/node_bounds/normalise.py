"""Moves and remainders of LayerNorm and RMSNorm on balls, from the geometry of the sphere.

Per token ``f(x) = weight sqrt(d) P N(v) + bias`` where ``v = (Pi x, sqrt(d eps)) / (s sqrt(d))`` is a unit vector of
one more coordinate, N divides by the length and P drops that coordinate; a move e is ``v + w`` with
``|w| = t <= |e| / (s sqrt(d))``. All bounds are functions of t: docs/network-certificates.md, section 4.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.node_bound import NodeBound, readout_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.numerics.rounding import ENTRY, outward

SMALL = 1e-150  # reaches below count as this: their squares are still numbers


@dataclass(frozen=True, eq=False)
class NormaliseBound(NodeBound):
    """``|f(x + e) - f(x)| <= sqrt(d) max|weight| 2 sin(asin(t) / 2)`` per token, never more than a chord of the sphere.

    Args:
        norm: The normalisation.
        x: Clean tokens.
    """

    norm: LayerNorm | RMSNorm
    x: Float[Tensor, "n d"]

    @cached_property
    def _centred(self) -> Float[Tensor, "n d"]:
        if not isinstance(self.norm, LayerNorm):
            return self.x
        centred: Tensor = self.x - self.x.mean(dim=-1, keepdim=True)
        return centred

    @cached_property
    def spread(self) -> Float[Tensor, "n"]:
        """The root s of the clean mean square."""
        spread: Tensor = (self._centred.square().mean(dim=-1) + self.norm.eps).sqrt()
        return spread

    @cached_property
    def _radius(self) -> Float[Tensor, "n"]:
        """``sqrt(zeta) = |Pi x| / (s sqrt(d))``, below 1: the clean output's part of the sphere's radius."""
        found: Tensor = torch.linalg.vector_norm(self._centred, dim=-1) / (self.spread * math.sqrt(self.norm.width))
        return found

    @cached_property
    def _sizes(self) -> tuple[float, float]:
        """``sqrt(d)`` and ``max |weight|``."""
        return math.sqrt(self.norm.width), float(self.norm.weight.abs().max())

    def _share(self, given: StateMove) -> Float[Tensor, "n"]:
        """T of every token."""
        return (given.tokens / (self.spread * self._sizes[0])).clamp_min(SMALL)

    def move(self, *inputs: StateMove) -> StateMove:
        share = self._share(inputs[0])
        return self._assembled(inputs[0], share, self._move(share), self._move_slope(share))

    def remainder(self, *inputs: StateMove) -> StateMove:
        share = self._share(inputs[0])
        slope = remainder_slope(share, self._move_slope(share))
        return self._assembled(inputs[0], share, torch.minimum(share * slope, share + self._move(share)), slope)

    def readout(self, cotangents: Tensor, *inputs: StateMove) -> Tensor:
        """``sum_i |C_i| |Rem_i|`` with ``C = weight c``; also ``||E||^2`` times the largest ``|C_i| kappa_i``."""
        (given,) = inputs
        share, weighted = self._share(given), cotangents * self.norm.weight
        if isinstance(self.norm, LayerNorm):
            weighted = weighted - weighted.mean(dim=-1, keepdim=True)  # the move less its bias is centred too
        lengths = outward(torch.linalg.vector_norm(weighted, dim=-1), ENTRY)
        width, _ = self._sizes
        slope = remainder_slope(share, self._move_slope(share))
        by_token = lengths @ (width * torch.minimum(share * slope, share + self._move(share)))
        curvature = remainder_curvature(share) / (width * self.spread.square())
        by_square = (lengths * curvature).amax(dim=-1) * given.frobenius**2
        if given.scaled is not None:
            factors, size = given.scaled
            by_square = torch.minimum(by_square, (lengths * curvature / factors.square()).amax(dim=-1) * size**2)
        bounds = torch.stack([by_token, by_square, readout_of(cotangents, self.remainder(given))])
        smallest: Tensor = torch.nan_to_num(bounds, nan=torch.inf).amin(dim=0)
        return smallest

    # ---- one token -------------------------------------------------------------------------------------------------

    def _move(self, share: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """``|N(v + w) - N(v)|`` without the last coordinate: a chord, at most the two radii together."""
        chord = torch.where(share < 1.0, 2.0 * (0.5 * share.clamp_max(1.0).asin()).sin(), 2.0)
        return outward(torch.minimum(torch.minimum(chord, 1.0 + self._radius), share * self._steepest), ENTRY)

    @cached_property
    def _steepest(self) -> Float[Tensor, "n"]:
        """``|f(x + e) - f(x)| <= |e| / (s s')^{1/2}`` with s' >= eps^{1/2}."""
        return (self.spread / math.sqrt(self.norm.eps)).sqrt()

    def _move_slope(self, share: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Supremum of the bound over its share up to this share."""
        near = 2.0 * (0.5 * share.clamp_max(1.0).asin()).sin() / share.clamp_max(1.0)
        far = torch.maximum(near, 1.0 + self._radius)
        return outward(torch.minimum(torch.where(share < 1.0, near, far), self._steepest), ENTRY)

    def _assembled(
        self, given: StateMove, share: Float[Tensor, "n"], bound: Float[Tensor, "n"], slope: Float[Tensor, "n"]
    ) -> StateMove:
        """From bounds on the sphere, and their largest quotients by the share, to the state."""
        width, weight = self._sizes
        steepness = weight * slope / self.spread
        whole = float(steepness.max()) * given.frobenius
        if given.scaled is not None:
            factors, size = given.scaled
            whole = min(whole, float((steepness / factors).max()) * size)
        bound = torch.where(given.tokens > 0.0, width * bound, torch.zeros_like(bound))
        return state_move(whole, weight * bound, bound[:, None] * self.norm.weight.abs())


def remainder_curvature(share: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Upper bound of ``|N(v + w) - N(v) - N'(v) w| / |w|^2`` over ``|w| <= t``: ``M + K t``, inf where t >= 1.

    ``K = 1 / (1 + sqrt(1 - t^2))``, ``M^2 = 1 / (4 - 4 K^2)`` where that maximum is inside, else ``K^2``.
    """
    inside = share.clamp_max(1.0)
    k = 1.0 / (1.0 + (1.0 - inside.square()).sqrt())
    square = torch.where(2.0 * k.square() <= 1.0, 0.25 / (1.0 - k.square()).clamp_min(0.25), k.square())
    return torch.where(share < 1.0, outward(square.sqrt() + k * inside, ENTRY), torch.inf)


def remainder_slope(share: Float[Tensor, "n"], move_slope: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Supremum of ``|N(v + w) - N(v) - N'(v) w| / |w|`` up to this share: curvature, or move and derivative apart."""
    return outward(torch.minimum(share * remainder_curvature(share), 1.0 + move_slope), ENTRY)
