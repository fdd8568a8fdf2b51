"""Moves and remainders of nodes that act entry by entry: activations and the product of two edges."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.activation_ranges import largest_slope, remainder_slope
from attnrobust.certify.network.node_bounds.node_bound import NodeBound, readout_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, scaled_move, state_move
from attnrobust.numerics.eigenvalues import symmetric_top

IMAGE_LIMIT = 1024  # inner width up to which the norm of W diag(slopes) is worth a decomposition at every radius


@dataclass(frozen=True, eq=False)
class ActivateBound(NodeBound):
    """``|phi(x + t) - phi(x)| <= slope |t|`` with the largest slope on the entry's own range; the remainder likewise.

    Where the inputs are an image ``E = E' W`` the norm of the whole is also at most ``||W diag(slopes)||_2 ||E'||_F``.

    Args:
        function: Name of the activation.
        x: Clean inputs.
    """

    function: str
    x: Float[Tensor, "n d"]

    def move(self, *inputs: StateMove) -> StateMove:
        return _sloped(inputs[0], largest_slope(self.function, self.x, inputs[0].entries))

    def remainder(self, *inputs: StateMove) -> StateMove:
        return _sloped(inputs[0], remainder_slope(self.function, self.x, inputs[0].entries))

    def weighted_remainder(self, weights: Tensor, *inputs: StateMove) -> float:
        slopes = remainder_slope(self.function, self.x, inputs[0].entries)
        return _sloped(inputs[0], slopes * weights).frobenius

    def readout(self, cotangents: Tensor, *inputs: StateMove) -> Tensor:
        """``sum |c_ik| slope_ik |t_ik|``, also as ``max |c_ik| slope_ik / reach_ik`` times the squared norm."""
        (given,) = inputs
        slopes = remainder_slope(self.function, self.x, given.entries)
        weighted = cotangents.abs() * slopes
        by_norm = torch.linalg.vector_norm(weighted, dim=(-2, -1)) * given.frobenius
        by_token = torch.linalg.vector_norm(weighted, dim=-1) @ given.tokens
        by_norm = torch.minimum(torch.nan_to_num(by_norm, nan=torch.inf), torch.nan_to_num(by_token, nan=torch.inf))
        return torch.minimum(by_norm, readout_of(cotangents, _sloped(given, slopes)))


def _sloped(given: StateMove, slopes: Float[Tensor, "n d"]) -> StateMove:
    found = scaled_move(given, slopes)
    if given.image is None or not bool(torch.isfinite(slopes).all()):
        return found
    source, weight = given.image
    if weight.shape[0] > IMAGE_LIMIT:
        return found
    scaled = weight * slopes.amax(dim=0)  # any token's slopes are at most these
    return found.within(float(symmetric_top(scaled @ scaled.T)) ** 0.5 * source.frobenius)


@dataclass(frozen=True, eq=False)
class ProductBound(NodeBound):
    """``(x + a)(y + b) - x y = a y + x b + a b``, entry by entry; the remainder is ``a b``.

    Args:
        x: Clean values of the first edge.
        y: Clean values of the second one.
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]

    def move(self, *inputs: StateMove) -> StateMove:
        first, second = inputs
        linear = scaled_move(first, self.y.abs()).plus(scaled_move(second, self.x.abs()))
        return linear.plus(self.remainder(first, second))

    def remainder(self, *inputs: StateMove) -> StateMove:
        return _product(*inputs)

    def readout(self, cotangents: Tensor, *inputs: StateMove) -> Tensor:
        """``|sum c a b|`` is also at most ``max |c| |a| |b|``, for the whole and for each token."""
        first, second = inputs
        largest = cotangents.abs().amax(dim=-1)
        bounds = torch.stack([
            largest.amax(dim=-1) * (first.frobenius * second.frobenius),
            largest @ (first.tokens * second.tokens),
        ])  # fmt: skip
        either = torch.nan_to_num(bounds, nan=torch.inf).amin(dim=0)
        return torch.minimum(either, readout_of(cotangents, self.remainder(first, second)))


def _product(first: StateMove, second: StateMove) -> StateMove:
    """``a b`` entry by entry: each factor's largest entry times the other's norm."""
    one, two = scaled_move(first, second.entries), scaled_move(second, first.entries)
    both = one.meet(two)
    return state_move(min(both.frobenius, first.frobenius * second.frobenius), both.tokens, both.entries)
