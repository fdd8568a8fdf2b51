"""Moves of affine nodes: their linear part."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.node_bound import AffineBound
from attnrobust.certify.network.node_bounds.state_move import StateMove, scaled_move, state_move
from attnrobust.certify.shared.head_sizes import spectral_norm
from attnrobust.numerics.rounding import FORMULA, outward


@dataclass(frozen=True, eq=False)
class MatrixBound(AffineBound):
    """``E = E' W``: ``||E||_F <= ||W||_2 ||E'||_F``, the same token by token, ``|E_ik| <= |W_k| |E'_i|``.

    Args:
        weight: W.
    """

    weight: Float[Tensor, "d e"]

    @cached_property
    def _norm(self) -> float:
        return outward(float(spectral_norm(self.weight)), FORMULA)

    @cached_property
    def _columns(self) -> Float[Tensor, "e"]:
        columns: Tensor = torch.linalg.vector_norm(self.weight, dim=0)
        return columns

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        by_token = given.tokens[:, None] * self._columns
        by_entry = given.entries @ self.weight.abs()
        return state_move(
            self._norm * given.frobenius, self._norm * given.tokens, torch.minimum(by_token, by_entry),
            image=(given, self.weight),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScaleBound(AffineBound):
    """``E_ik = factor_k E'_ik``.

    Args:
        factor: One number or one per coordinate.
    """

    factor: Tensor

    def move(self, *inputs: StateMove) -> StateMove:
        return scaled_move(inputs[0], self.factor.abs().expand_as(inputs[0].entries))


class SumBound(AffineBound):
    """The triangle inequality, for the whole, every token and every entry."""

    def move(self, *inputs: StateMove) -> StateMove:
        return inputs[0].plus(inputs[1])
