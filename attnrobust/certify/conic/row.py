"""One softmax row (one head, one query) of a margin at the clean input, as numpy arrays over its visible keys."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.certify.shared.constants import DUAL_ORDER, MoveBudget
from attnrobust.certify.shared.softmax_rows import SoftmaxRows
from attnrobust.layers.attention import Attention
from attnrobust.numerics.rounding import ENTRY, NONE, UNIT, outward
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall, TokenNorm

Array = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class MoveSet(MoveBudget):
    """How far tokens move in one perturbation set, and in which norm.

    Args:
        norm: Token norm of a per-token threat; None for a shared Frobenius budget.
    """

    norm: TokenNorm | None


def move_set(threat: FrobeniusBall | PerTokenBall, n: int, d: int, radius: float) -> MoveSet:
    """Enclosing norms of a threat's set of size ``radius``."""
    norm = threat.norm if isinstance(threat, PerTokenBall) else None
    share = UNIT if norm is not None else NONE  # the factors are square roots of integers
    return MoveSet(
        epsilon=radius,
        frobenius=outward(radius * threat.frobenius_factor(n, d), share),
        token=outward(radius * threat.token_factor(n, d), share),
        norm=norm,
    )


@dataclass(frozen=True, eq=False)
class Row:
    """Head h, query i. Keys j are the visible ones; moving tokens l are those that may move, numbered 0 .. m - 1.

    Args:
        share: pi_i, the row's weight in the pooled output.
        log_weight: log w_j at the clean input.
        weight: w_j.
        drop: v_j = mean - z_j, z_j the value of key j along the functional; mean zero under w.
        value: gamma: the value changes by ``t_j = gamma . delta_j``.
        beta: The logit of key j changes by ``beta . delta_j`` ...
        alpha: ... and ``alpha_j . delta_i`` (keys, d), centred under w; zero rows where i does not move ...
        bilinear: ... and ``delta_i A delta_j``.
        query: Number of token i among the moving ones, or -1.
        key: Number of each key among the moving ones, or -1, (keys,).
        moving: m.
    """

    share: float
    log_weight: Array
    weight: Array
    drop: Array
    value: Float[np.ndarray, "d"]
    beta: Float[np.ndarray, "d"]
    alpha: Float[np.ndarray, "keys d"]
    bilinear: Float[np.ndarray, "d d"]
    query: int
    key: Int[np.ndarray, "keys"]
    moving: int

    @property
    def keys(self) -> int:
        """Visible keys."""
        return len(self.weight)

    @property
    def key_moves(self) -> Bool[np.ndarray, "keys"]:
        """Which keys move."""
        return self.key >= 0

    @property
    def query_moves(self) -> bool:
        """Whether token i moves."""
        return self.query >= 0

    @cached_property
    def centring(self) -> Float[np.ndarray, "keys keys"]:
        """I - 1 w^T; its diagonal is summed from the other weights, so that it is accurate where w_j is near 1."""
        out = np.tile(-self.weight, (self.keys, 1))
        np.fill_diagonal(out, 0.0)
        np.fill_diagonal(out, -out.sum(axis=1))
        return out

    @cached_property
    def mixing(self) -> Float[np.ndarray, "keys m"]:
        """C: ``delta_j - sum_l w_l delta_l = sum_l C_jl delta_l`` over moving tokens."""
        out = np.zeros((self.keys, self.moving))
        out[:, self.key[self.key_moves]] = self.centring[:, self.key_moves]
        return out

    @cached_property
    def mixing_own(self) -> Float[np.ndarray, "keys"]:
        """C_ji, 0 where i does not move."""
        return self.mixing[:, self.query] if self.query_moves else np.zeros(self.keys)

    def mixing_rest(self, order: float) -> Float[np.ndarray, "keys"]:
        """Norm of ``(C_jl)_(l != i)``."""
        rest = self.mixing.copy()
        if self.query_moves:
            rest[:, self.query] = 0.0
        return np.asarray(np.linalg.norm(rest, ord=order, axis=1))

    @cached_property
    def directions(self) -> Float[np.ndarray, "keys m d"]:
        """l_j: the linear part of the centred logit change is ``sum_l l_jl . delta_l``."""
        out = np.asarray(self.mixing[:, :, None] * self.beta)
        if self.query_moves:
            out[:, self.query] += self.alpha
        return out

    def direction_norms(self, order: float, *, by_token: bool = False) -> tuple[Array, Array]:
        """Norm of the block of token i, and of the other blocks: together, or the sum over tokens."""
        blocks = np.linalg.norm(self.directions, ord=order, axis=2)
        own = blocks[:, self.query].copy() if self.query_moves else np.zeros(self.keys)
        if self.query_moves:
            blocks[:, self.query] = 0.0
        return own, blocks.sum(axis=1) if by_token else np.linalg.norm(blocks, axis=1)

    @property
    def constant(self) -> bool:
        """Whether the attention weights cannot change, so that the row is linear in the move."""
        return self.keys == 1 or not (self.directions.any() or self.bilinear_norm > 0.0)

    @cached_property
    def bilinear_norm(self) -> float:
        """Upper bound of ``||A||_2``; 0 where token i does not move."""
        return outward(float(np.linalg.norm(self.bilinear, 2)), ENTRY) if self.query_moves else 0.0

    @cached_property
    def numerical_radius(self) -> float:
        """Upper bound of ``|x A x| / |x|^2``; 0 where token i does not move."""
        if not self.query_moves:
            return 0.0
        symmetric = float(np.abs(np.linalg.eigvalsh(0.5 * (self.bilinear + self.bilinear.T))).max())
        return symmetric + ENTRY * self.bilinear_norm

    def value_range(self, reach: MoveSet) -> Float[np.ndarray, "keys"]:
        """Bound of ``|gamma . delta_j|``; 0 where key j does not move."""
        order = 2.0 if reach.norm is None else DUAL_ORDER[reach.norm]
        return float(np.linalg.norm(self.value, ord=order)) * reach.epsilon * self.key_moves


def rows_of(
    problem: Problem, functional: Float[Tensor, "e"], weights: Float[Tensor, "n"], movable: Bool[Tensor, "n"]
) -> Iterator[Row]:
    """Every row that counts: its pooling weight is not 0.

    Args:
        problem: The question; its network is dot-product attention.
        functional: Direction of the pooled output whose drop is bounded.
        weights: Pooling weights.
        movable: Tokens that may move.
    """
    layer, x = problem.network, problem.clean.points
    assert isinstance(layer, Attention)  # noqa: S101 - the method refuses other networks; narrows the type
    clean = SoftmaxRows(layer, x, problem.mass)
    beta, alpha = _numpy(clean.beta), _numpy(clean.alpha)
    gamma = layer.value_output @ functional
    values, logs, bilinear = _numpy(gamma @ x.T), _numpy(clean.log_weight), _numpy(layer.bilinear)
    number = np.where(_numpy(movable) > 0, np.cumsum(_numpy(movable)) - 1, -1).astype(np.int64)
    for h in range(layer.heads):
        for i in np.flatnonzero(_numpy(weights)):
            seen = np.flatnonzero(np.isfinite(logs[h, i]))
            weight = np.exp(logs[h, i, seen])
            weight = weight / weight.sum()
            mean = float(weight @ values[h, seen])
            row = Row(
                share=float(weights[i]), log_weight=logs[h, i, seen], weight=weight, drop=mean - values[h, seen],
                value=_numpy(gamma[h]), beta=beta[h, i], alpha=alpha[h, seen], bilinear=bilinear[h],
                query=int(number[i]), key=number[seen], moving=int(_numpy(movable).sum()),
            )  # fmt: skip
            yield replace(row, alpha=row.centring @ row.alpha * row.query_moves)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().to(torch.float64).numpy())
