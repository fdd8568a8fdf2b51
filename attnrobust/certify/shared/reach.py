"""How far a threat of a given size moves tokens, and how per-row bounds add up to what a goal measures."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken


def attention_of(problem: Problem) -> Attention:
    """The attention layer of a problem that a method for it did not refuse."""
    layer = problem.network
    assert isinstance(layer, Attention)  # noqa: S101 - declared by the methods; narrows the type
    return layer


def visible_tokens(layer: Attention, n: int) -> Bool[Tensor, "n"]:
    """Tokens that at least one query sees; the others (padding) matter as queries only."""
    bias = layer.score_bias(n)
    if bias is None:
        return torch.ones(n, dtype=torch.bool, device=layer.device)
    return ~torch.isneginf(bias).flatten(0, -2).all(dim=0)


@dataclass(frozen=True, eq=False)
class Reach:
    """Largest moves ``h`` of a threat of size 1; everything scales with the size.

    Args:
        frobenius: ``||h||_F``.
        token: Largest move of one token.
        attended: Largest move of a token that some query sees.
        pair: Largest difference of the moves of two tokens that queries see.
        movable: Which tokens may move, (n,).
    """

    frobenius: float
    token: float
    attended: float
    pair: float
    movable: Bool[Tensor, "n"]

    @classmethod
    def of(cls, problem: Problem, visible: Bool[Tensor, "n"] | None = None) -> "Reach":
        """The reach of the problem's threat at its input; ``visible`` None means that every query sees every token."""
        n, d = problem.clean.n, problem.clean.width
        frobenius, token = problem.moves.frobenius_factor(n, d), problem.moves.token_factor(n, d)
        movable = problem.moves.movable(n).to(problem.clean.points.device)
        visible = torch.ones_like(movable) if visible is None else visible
        seen_movers = int((movable & visible).sum())
        if seen_movers == 0 or int(visible.sum()) == 1:
            pair = 0.0
        elif seen_movers == 1 or isinstance(problem.threat, AnyToken):
            pair = token  # the other token stays
        else:
            pair = min(2.0 * token, 2.0**0.5 * frobenius)
        return cls(frobenius, token, token if seen_movers else 0.0, pair, movable)


@dataclass(frozen=True, eq=False)
class RowSums:
    """Adds per-row bounds up to the norm that the goal measures: all rows in l2, or a weighted mean of rows.

    Args:
        pool: Row weights (n,), >= 0 with sum 1, or None for all rows.
        reach: What the threat may move.
    """

    pool: Float[Tensor, "n"] | None
    reach: Reach

    def steady(self, rows: Float[Tensor, "*c n"]) -> Float[Tensor, "*c"]:
        """Rows bounded by ``rows_i`` each."""
        return torch.linalg.vector_norm(rows, dim=-1) if self.pool is None else rows @ self.pool

    def moved(self, rows: Float[Tensor, "*c n"]) -> Float[Tensor, "*c"]:
        """Rows bounded by ``rows_i |h_i|``, per unit size of the threat."""
        rows = rows * self.reach.movable
        if self.pool is None:
            together = self.reach.frobenius * rows.amax(dim=-1)
            return torch.minimum(together, self.reach.token * torch.linalg.vector_norm(rows, dim=-1))
        rows = rows * self.pool
        together = self.reach.frobenius * torch.linalg.vector_norm(rows, dim=-1)
        return torch.minimum(together, self.reach.token * rows.sum(dim=-1))

    def moved_squared(self) -> float:
        """Rows bounded by ``|h_i|^2``, per unit squared size of the threat."""
        if self.pool is None:
            return self.reach.token * self.reach.frobenius
        chosen = self.pool * self.reach.movable
        return min(float(chosen.max()) * self.reach.frobenius**2, float(chosen.sum()) * self.reach.token**2)
