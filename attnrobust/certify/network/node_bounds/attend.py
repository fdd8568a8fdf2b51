"""Moves and remainders of dot-product attention; docs/network-certificates.md, section 5."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.closed_form.claims import whole_output
from attnrobust.certify.displacement.base import ValueRows
from attnrobust.certify.network.node_bounds.attend_remainder import RowRemainders
from attnrobust.certify.network.node_bounds.node_bound import NodeBound, readout_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, token_move
from attnrobust.certify.shared.head_sizes import HeadSizes, ValueView, spectral_norm, value_views
from attnrobust.certify.shared.reach import visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.linear_map import largest_singular_value_upper
from attnrobust.numerics.rounding import FORMULA, outward

DENSE_LIMIT = 600  # smaller side up to which the norm of the derivative is decomposed


@dataclass(eq=False)
class AttendBound(NodeBound):
    """One attention layer at its clean tokens.

    The remainder has the parts of the displacement certificate without its first order, jointly for the whole output
    and one by one for its rows. The move is the derivative and that remainder; or, where it is smaller, values moved
    under the clean weights plus moved weights on moved values, which saturates. Each bounds the other's remainder.

    Args:
        attention: The layer.
        points: Clean tokens.
        mass: Their masses or None.
        chance: Failure probability of the eigenvalue bounds.
    """

    attention: Attention
    points: Float[Tensor, "n d"]
    mass: Float[Tensor, "n"] | None
    chance: Chance
    _remainders: dict[tuple[bool, ...], RowRemainders] = field(default_factory=dict, repr=False)

    # ---- move ------------------------------------------------------------------------------------------------------

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        if given.frobenius == 0.0:
            return self._nothing(given)
        linear = self._derivative * given.frobenius
        first = token_move(linear, torch.full_like(given.tokens, linear), self.attention.out_width)
        return self._saturating(given).meet(first.plus(self._local(given)))

    def _nothing(self, given: StateMove) -> StateMove:
        return token_move(0.0, torch.zeros_like(given.tokens), self.attention.out_width)

    def _saturating(self, given: StateMove) -> StateMove:
        """Values and weights apart; what moved weights do saturates."""
        found = [self._in_view(view, given) for view in self._views]
        tokens = torch.stack([rows for _, rows in found]).amin(dim=0)
        return token_move(min(whole for whole, _ in found), tokens, self.attention.out_width)

    @cached_property
    def _visible(self) -> Bool[Tensor, "n"]:
        return visible_tokens(self.attention, int(self.points.shape[0])).to(self.points.device)

    @cached_property
    def _sizes(self) -> HeadSizes:
        return HeadSizes.of(self.attention, self.points, self._visible)

    @cached_property
    def _views(self) -> tuple[ValueView, ...]:
        return value_views(self.attention, self.points, self._visible, whole_output(self.points.device))

    @cached_property
    def _weights(self) -> Float[Tensor, "h n n"]:
        return self.attention.weights(self.points, self.mass)

    def _in_view(self, view: ValueView, given: StateMove) -> tuple[float, Float[Tensor, "n"]]:
        """Bounds of the whole and of the rows; per head first, then heads as the view combines them."""
        pair = self._pair(given)
        values = view.norms[0][:, None] * self._averaged(given)
        varied = self._rows_by_variation(view, given, pair)
        weighted = torch.minimum(torch.linalg.vector_norm(varied, dim=1), self._weights_in_l2(view, given))
        whole = view.total((view.norms[0] * self._moved_values(given) + weighted)[None])
        return float(outward(whole, FORMULA)), outward(view.total((values + varied).T), FORMULA)

    def _pair(self, given: StateMove) -> float:
        """Largest difference of the moves of two visible tokens."""
        seen = given.tokens[self._visible].sort(descending=True).values
        return min(float(seen[:2].sum()), math.sqrt(2.0) * given.frobenius) if len(seen) > 1 else 0.0

    def _averaged(self, given: StateMove) -> Float[Tensor, "h n"]:
        """``|sum_j P_ij delta_j|``: by tokens, or by the norm of the row of P."""
        moving = self._weights * (given.tokens > 0.0)
        by_tokens = torch.nan_to_num(moving @ given.tokens, nan=torch.inf)
        length = torch.linalg.vector_norm(moving, dim=-1)
        return torch.minimum(by_tokens, torch.nan_to_num(length * given.frobenius, nan=torch.inf))

    def _moved_values(self, given: StateMove) -> Float[Tensor, "h"]:
        """``||P_h Delta||_F``."""
        norms = spectral_norm(self._weights * (given.tokens > 0.0)) * given.frobenius
        return torch.minimum(norms.nan_to_num(nan=torch.inf), torch.linalg.vector_norm(self._averaged(given), dim=-1))

    def _rows_by_variation(self, view: ValueView, given: StateMove, pair: float) -> Float[Tensor, "h n"]:
        """``diam(values) tanh(osc / 4)``: what moved weights do to a row."""
        sizes = self._sizes
        gradient = sizes.key_gradient + sizes.bilinear[:, None] * given.tokens
        change = gradient * pair + sizes.query_diameter[:, None] * given.tokens
        diameter = view.diameters[0] + view.norms[0] * pair
        return (diameter[:, None] * torch.tanh(0.25 * change)).nan_to_num(nan=torch.inf)

    def _weights_in_l2(self, view: ValueView, given: StateMove) -> Float[Tensor, "h"]:
        """``||(P' - P) V'||_F <= ||P' - P||_F ||V'||_2``; the softmax is 1/2-Lipschitz."""
        sizes, size = self._sizes, given.frobenius
        scores = (sizes.query_spectral + sizes.bilinear * size + sizes.key_gradient_norm) * size
        return (0.5 * scores * (view.spectral[0] + view.norms[0] * size)).nan_to_num(nan=torch.inf)

    # ---- remainder -------------------------------------------------------------------------------------------------

    def remainder(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        if given.frobenius == 0.0:
            return self._nothing(given)
        linear = self._derivative * given.frobenius
        first = token_move(linear, torch.full_like(given.tokens, linear), self.attention.out_width)
        return self._local(given).meet(self._saturating(given).plus(first))

    def _local(self, given: StateMove) -> StateMove:
        """The remainder from its own parts."""
        local, size = self._remainder(given), given.frobenius
        return token_move(local.whole(size), local.rows(size, given.tokens), self.attention.out_width)

    def readout(self, cotangents: Tensor, *inputs: StateMove) -> Tensor:
        """``sum over heads and rows of |U_h c_i| R_hi`` with the row remainders before the output projection."""
        (given,) = inputs
        plain = readout_of(cotangents, self.remainder(given))
        if given.frobenius == 0.0:
            return plain
        return torch.minimum(plain, self._remainder(given).readout(cotangents, given.frobenius, given.tokens))

    @cached_property
    def _derivative(self) -> float:
        share, seed = self.chance.next_event()
        linear = AttentionJacobian(self.attention, self.points, self.mass).linear_map()
        bound = largest_singular_value_upper(linear, failure_probability=share, seed=seed, dense_limit=DENSE_LIMIT)
        self.chance.spend(bound.failure_probability)
        return bound.value

    @cached_property
    def _clean(self) -> ValueRows:
        return ValueRows(self.attention, self.points, self.mass)

    def _remainder(self, given: StateMove) -> RowRemainders:
        movable = given.tokens > 0.0
        key = tuple(movable.tolist())
        if key not in self._remainders:
            self._remainders[key] = RowRemainders(self._clean, movable, self.chance)
        return self._remainders[key]
