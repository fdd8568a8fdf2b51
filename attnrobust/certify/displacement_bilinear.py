"""Displacement certificate: the parts of the remainder that are products of two linear images of the move."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement_base import CleanRows, stack_weights
from attnrobust.linear_map import largest_eigenvalue_upper

POWER_STEPS = 8  # only balances two factors; any value is sound
REACH_TOLERANCE = 0.03  # relative accuracy of the per-head norms; they enter under a square root


@dataclass(frozen=True, eq=False)
class ValueLogitForm:
    """``||stack E[l gamma]||^2 <= |D|^2 X(D)``, X a sum over heads of two squared linear images (eq. 17).

    Args:
        rows: The clean rows.
        seed: Seed of random start vectors.
        failure_probability: Of every eigenvalue bound (one per head).
        dense_limit: Size up to which eigenvalues are computed without randomness.
    """

    rows: CleanRows
    seed: int
    failure_probability: float
    dense_limit: int

    def _logit_part(self, head: int, moves: Tensor) -> Tensor:
        rows, w = self.rows, self.rows.w[head]
        alpha = moves @ rows.layer.w_q[head]
        raw = rows.slopes[head] @ moves.T + alpha @ rows.keys[head].T
        centred = raw - (w * raw).sum(dim=-1, keepdim=True)
        centred = centred * w.square() * stack_weights(rows)[:, None]
        centred = centred - w * centred.sum(dim=-1, keepdim=True)
        pulled = centred.T @ rows.slopes[head] + (centred @ rows.keys[head]) @ rows.layer.w_q[head].T
        return pulled * rows.moves[:, None]

    def _value_part(self, head: int, moves: Tensor) -> Tensor:
        w_v = self.rows.w_v[head]
        return (moves @ w_v) @ w_v.T * self.rows.moves[:, None]

    @cached_property
    def _balance(self) -> Float[Tensor, "h"]:
        """Per head: value norm over logit norm, estimated; any positive number is sound."""
        rows = self.rows
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(rows.points.shape, generator=generator, dtype=torch.float64).to(rows.points)
        ratios = []
        for head in range(rows.layer.heads):
            vector, length = start, start.new_tensor(1.0)
            for _ in range(POWER_STEPS):
                vector = self._logit_part(head, vector / torch.linalg.vector_norm(vector).clamp_min(1e-300))
                length = torch.linalg.vector_norm(vector)
            ratios.append(rows.value_norms[head] / length.sqrt().clamp_min(1e-150))
        return torch.stack(ratios).clamp(1e-12, 1e12)

    def _head_form(self, head: int, moves: Tensor) -> Tensor:
        balance = self._balance[head]
        return 0.5 * (balance * self._logit_part(head, moves) + self._value_part(head, moves) / balance)

    @cached_property
    def reach(self) -> tuple[list[float], float]:
        """Per head ``sup x_h`` over moves of norm 1, and the failure probability of all of them together."""
        rows = self.rows
        out, failure = [], 0.0
        for head in range(rows.layer.heads):

            def product(flat: Tensor, head: int = head) -> Tensor:
                return self._head_form(head, flat.reshape(rows.points.shape)).reshape(-1)

            bounds = largest_eigenvalue_upper(
                product, rows.points.numel(), failure_probability=self.failure_probability,
                seed=self.seed + head, tol=REACH_TOLERANCE, dense_limit=self.dense_limit, device=rows.points.device,
            )  # fmt: skip
            out.append(max(bounds.upper.value, 0.0))
            failure += bounds.upper.failure_probability
        return out, failure

    def apply(self, moves: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Half the gradient of X at D."""
        rows = self.rows
        reach, balance = self._balance.new_tensor(self.reach[0]), self._balance
        weight = (0.5 * reach * balance)[:, None, None] * rows.w.square() * stack_weights(rows)[:, None]
        logit = rows.logits_adjoint(weight * rows.logits(moves))
        gamma = torch.einsum("nd,hdv->hnv", moves, rows.w_v) * (0.5 * reach / balance)[:, None, None]
        return logit + torch.einsum("hnv,hdv->nd", gamma, rows.w_v) * rows.moves[:, None]


@dataclass(frozen=True, eq=False)
class QueryKeyForm:
    """``||stack E[q vh]||^2 <= |D|^2 X(D)`` through the balanced factors of ``A`` (eq. 18)."""

    rows: CleanRows

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self.rows
        left, values, right = rows.bilinear_factors
        left, right = left * values.sqrt()[:, None], right * values.sqrt()[:, None]
        spread = (rows.value_reach.square() * stack_weights(rows) * rows.moves).clamp_min(0.0)
        balance = spread.amax(dim=-1).clamp(1e-24, 1e24).rsqrt()
        both = torch.cat([left, right], dim=-1)
        # At every token the form is at most (left left^T + right right^T) / (2 balance).
        reach = torch.linalg.matrix_norm(both, 2).square() * torch.maximum(
            balance * spread.amax(dim=-1), 1.0 / balance
        ) / 2.0  # fmt: skip
        query = 0.5 * (reach * balance)[:, None] * spread
        return left, right, query, 0.5 * reach / balance

    def apply(self, moves: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Half the gradient of X at D."""
        left, right, query, key = self._factors
        queries = torch.einsum("nd,hdr->hnr", moves, left) * query[..., None]
        keys = torch.einsum("nd,hdr->hnr", moves, right) * key[:, None, None]
        out = torch.einsum("hnr,hdr->nd", queries, left) + torch.einsum("hnr,hdr->nd", keys, right)
        return out * self.rows.moves[:, None]
