"""Displacement certificate: the parts of the remainder that are products of two linear images of the move."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement_base import CleanRows, stack_weights
from attnrobust.linear_map import largest_eigenvalue_upper

POWER_STEPS = 8  # only balances two factors; any value is sound
ESTIMATE_STREAM = 0x5EED_0000  # estimates draw from another stream: a matrix must not depend on its own start vector
BALANCE_SEED = 2**40
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
        generator = torch.Generator().manual_seed(self.seed ^ ESTIMATE_STREAM)
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
                moves = flat.reshape(rows.points.shape) * rows.moves[:, None]  # masked on both sides: symmetric
                return self._head_form(head, moves).reshape(-1)

            bounds = largest_eigenvalue_upper(
                product, rows.points.numel(), failure_probability=self.failure_probability,
                seed=self.seed + head, tol=REACH_TOLERANCE, dense_limit=self.dense_limit, device=rows.points.device,
            )  # fmt: skip
            out.append(max(bounds.upper.value, 0.0))
            failure += bounds.upper.failure_probability
        return out, failure

    @cached_property
    def _reach_vector(self) -> Float[Tensor, "h"]:
        return self._balance.new_tensor(self.reach[0])

    @cached_property
    def logit_weight(self) -> Float[Tensor, "h n n"]:
        """Coefficients of l_j^2 in X."""
        head = (0.5 * self._reach_vector * self._balance)[:, None, None]
        return head * self.rows.w.square() * stack_weights(self.rows)[:, None]

    @cached_property
    def value_weight(self) -> Float[Tensor, "h"]:
        """Coefficients of |gamma|^2 in X."""
        weight: Tensor = 0.5 * self._reach_vector / self._balance
        return weight


@dataclass(frozen=True, eq=False)
class QueryKeyForm:
    """``||stack E[q vh]||^2 <= |D|^2 X(D)`` through the balanced factors of ``A`` (eq. 18)."""

    rows: CleanRows

    @cached_property
    def left(self) -> Float[Tensor, "h d r"]:
        """Query side of the balanced factors: ``A = left right^T``."""
        left, values, _ = self.rows.bilinear_factors
        return left * values.sqrt()[:, None]

    @cached_property
    def right(self) -> Float[Tensor, "h d r"]:
        """Key side of the balanced factors."""
        _, values, right = self.rows.bilinear_factors
        return right * values.sqrt()[:, None]

    @cached_property
    def _spread(self) -> Float[Tensor, "h n"]:
        return self.rows.value_reach.square() * stack_weights(self.rows) * self.rows.moves

    @cached_property
    def _balance(self) -> Float[Tensor, "h"]:
        return self._spread.amax(dim=-1).clamp(1e-24, 1e24).rsqrt()

    @cached_property
    def _reach(self) -> Float[Tensor, "h"]:
        """``sup x_h``: at every token the form is at most (left left^T + right right^T) max(...) / 2."""
        both = torch.linalg.matrix_norm(torch.cat([self.left, self.right], dim=-1), 2).square()
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
