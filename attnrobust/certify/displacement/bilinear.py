"""Displacement certificate: the parts of the remainder that are products of two linear images of the move."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows, stack_weights
from attnrobust.numerics.rounding import SMALLEST_UNIT, nonzero

POWER_STEPS = 8  # only balances two factors; any value is sound


@dataclass(frozen=True, eq=False)
class ValueLogitForm:
    """``||stack sum_j p_j |l_j| |gamma_j||| <= |D| (sum_h |X_h D|^2)^{1/2}``, X_h two squared linear images (eq. 17).

    Args:
        rows: The clean rows.
        paired: The coefficients p.
        balance: Per head the weight of the logits against the values in X_h; any positive number is sound.
    """

    rows: MovingRows
    paired: Float[Tensor, "h n n"]
    balance: Float[Tensor, "h"]

    def grown(self, paired: Float[Tensor, "h n n"]) -> "ValueLogitForm":
        """The same with other coefficients; the balance follows their energy."""
        reach = self.rows.logit_reach.square()
        energies = [((weight * self.rows.moves).square() * reach).sum(dim=(1, 2)) for weight in (self.paired, paired)]
        ratio = (nonzero(energies[0]) / nonzero(energies[1])).sqrt()
        return ValueLogitForm(self.rows, paired, (self.balance * ratio).nan_to_num(1.0).clamp(1e-12, 1e12))

    @cached_property
    def logit_weight(self) -> Float[Tensor, "h n n"]:
        """Coefficients of l_j^2 in X_h."""
        weight: Tensor = 0.5 * self.balance[:, None, None] * self.paired.square() * stack_weights(self.rows)[:, None]
        return weight

    @cached_property
    def value_weight(self) -> Float[Tensor, "h"]:
        """Coefficients of |gamma|^2 in X_h."""
        weight: Tensor = 0.5 / self.balance
        return weight


def value_logit_form(rows: MovingRows, *, seed: int) -> ValueLogitForm:
    """The form at the clean weights, with a balance that is estimated: value norm over logit norm."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows.clean.points.shape, generator=generator, dtype=torch.float64).to(rows.clean.points)
    ratios = []
    for head in range(rows.clean.layer.heads):
        vector, length = start, start.new_tensor(1.0)
        for _ in range(POWER_STEPS):
            vector = _logit_part(rows, head, vector / nonzero(torch.linalg.vector_norm(vector)))
            length = torch.linalg.vector_norm(vector)
        ratios.append(rows.clean.value_norms[head] / nonzero(length.sqrt(), SMALLEST_UNIT))
    return ValueLogitForm(rows, rows.clean.weight, torch.stack(ratios).clamp(1e-12, 1e12))


def _logit_part(rows: MovingRows, head: int, moves: Tensor) -> Tensor:
    """Half the gradient of ``sum_i rho_i sum_j w_ij^2 l_ij^2`` of one head."""
    if rows.clean.layer.rotary is not None:
        return _turned_logit_part(rows, head, moves)
    w = rows.clean.weight[head]
    alpha = moves @ rows.clean.layer.w_q[head]
    raw = rows.clean.beta[head] @ moves.T + alpha @ rows.clean.keys[head].T
    centred = raw - (w * raw).sum(dim=-1, keepdim=True)
    centred = centred * w.square() * stack_weights(rows)[:, None]
    centred = centred - w * centred.sum(dim=-1, keepdim=True)
    pulled = centred.T @ rows.clean.beta[head] + (centred @ rows.clean.keys[head]) @ rows.clean.layer.w_q[head].T
    return pulled * rows.moves[:, None]


def _turned_logit_part(rows: MovingRows, head: int, moves: Tensor) -> Tensor:
    """The same with rotary positions."""
    clean, layer = rows.clean, rows.clean.layer
    w, queries, keys = clean.weight[head], clean.queries[head], clean.keys[head]
    raw = queries @ layer.turned(moves @ layer.w_k[head]).T + layer.turned(moves @ layer.w_q[head]) @ keys.T
    centred = raw - (w * raw).sum(dim=-1, keepdim=True)
    centred = centred * w.square() * stack_weights(rows)[:, None]
    centred = centred - w * centred.sum(dim=-1, keepdim=True)
    pulled = layer.turned_back(centred.T @ queries) @ layer.w_k[head].T
    return (pulled + layer.turned_back(centred @ keys) @ layer.w_q[head].T) * rows.moves[:, None]


@dataclass(frozen=True, eq=False)
class QueryKeyForm:
    """``||stack E[q vh]||^2 <= |D|^2 X(D)`` through the balanced factors of ``A`` (eq. 18)."""

    rows: MovingRows

    @cached_property
    def _spread(self) -> Float[Tensor, "h n"]:
        return self.rows.value_reach.square() * stack_weights(self.rows) * self.rows.moves

    @cached_property
    def _balance(self) -> Float[Tensor, "h"]:
        return self._spread.amax(dim=-1).clamp(1e-24, 1e24).rsqrt()

    @cached_property
    def _reach(self) -> Float[Tensor, "h"]:
        """``sup x_h``: at every token the form is at most (left left^T + right right^T) max(...) / 2."""
        both = torch.linalg.matrix_norm(torch.cat(self.rows.clean.balanced_factors, dim=-1), 2).square()
        largest = torch.maximum(self._balance * self._spread.amax(dim=-1), 1.0 / self._balance)
        reach: Tensor = 0.5 * both * largest
        return reach

    @cached_property
    def query_weight(self) -> Float[Tensor, "h n"]:
        """Coefficients of ``|left^T delta_i|^2`` in X."""
        return 0.5 * (self._reach * self._balance)[:, None] * self._spread

    @cached_property
    def key_weight(self) -> Float[Tensor, "h"]:
        """Coefficients of ``|right^T delta_j|^2`` in X."""
        weight: Tensor = 0.5 * self._reach / self._balance
        return weight
