"""The resolved goals of several problems of one shape, stacked: used shares and their derivatives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.goals import ResolvedGoal
from attnrobust.numerics.running_error import gamma


@dataclass(frozen=True, eq=False)
class ScaledGoal(ResolvedGoal):
    """A displacement of all rows in which each row has its own factor.

    Args:
        row_scale: Factors (n,); ``clean`` has them applied already.
    """

    row_scale: Float[Tensor, "n"] = field(kw_only=True)

    def pooled(self, output: Float[Tensor, "*b n e"]) -> Float[Tensor, "*b n e"]:
        """Every row times its factor."""
        return output * self.row_scale[:, None]

    def pooled_rounding(self, output: Float[Tensor, "n e"], error: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """Every row's error times its factor, and one product's rounding."""
        return self.pooled(error) + gamma(1) * self.pooled(output.abs())


@dataclass(frozen=True, eq=False)
class StackedGoal:
    """The resolved goals of p problems of one shape, stacked.

    Args:
        weights: Row weights (p, n), or None where every row counts.
        functionals: (p, c, e), or None for displacements.
        budgets: What a change must reach to be a violation, rounding included (p, c).
        clean: Pooled clean outputs (p, n, e) or (p, e).
        row_scale: Factors on the rows of a displacement (p, n), or None where every row counts alike.
    """

    weights: Float[Tensor, "p n"] | None
    functionals: Float[Tensor, "p c e"] | None
    budgets: Float[Tensor, "p c"]
    clean: Float[Tensor, "p ..."]
    row_scale: Float[Tensor, "p n"] | None = None

    @classmethod
    def stack(cls, goals: Sequence[ResolvedGoal]) -> "StackedGoal":
        """Stack goals of equal shape."""
        first = goals[0]
        return cls(
            weights=None if first.weights is None else torch.stack([_present(g.weights) for g in goals]),
            functionals=None if first.functionals is None else torch.stack([_present(g.functionals) for g in goals]),
            budgets=torch.stack([g.violated_at for g in goals]),
            clean=torch.stack([g.clean for g in goals]),
            row_scale=torch.stack([g.row_scale for g in goals if isinstance(g, ScaledGoal)])
            if isinstance(first, ScaledGoal)
            else None,
        )

    def take(self, index: Int[Tensor, "q"]) -> "StackedGoal":
        """The goals of some of the problems."""
        return StackedGoal(
            weights=None if self.weights is None else self.weights[index],
            functionals=None if self.functionals is None else self.functionals[index],
            budgets=self.budgets[index],
            clean=self.clean[index],
            row_scale=None if self.row_scale is None else self.row_scale[index],
        )

    def of_rows(self, at: Int[Tensor, "q"] | None) -> "StackedGoal":
        """The same goals on outputs of the rows ``at`` only; every other row has weight 0."""
        return self if at is None or self.weights is None else replace(self, weights=self.weights[:, at])

    def pool(self, output: Float[Tensor, "p r n e"]) -> Float[Tensor, "p r ..."]:
        """The part of outputs (or of their derivatives) that counts."""
        if self.row_scale is not None:
            return output * self.row_scale[:, None, :, None]
        if self.weights is None:
            return output
        return torch.matmul(self.weights[:, None, None, :], output).squeeze(-2)

    def unpool(self, cotangent: Float[Tensor, "p r ..."]) -> Float[Tensor, "p r n e"]:
        """Adjoint of ``pool``."""
        if self.row_scale is not None:
            return cotangent * self.row_scale[:, None, :, None]
        if self.weights is None:
            return cotangent
        return self.weights[:, None, :, None] * cotangent[:, :, None, :]

    def shares(self, output: Float[Tensor, "p r n e"]) -> Float[Tensor, "p r c"]:
        """Used share of every budget."""
        difference = self.pool(output) - self.clean[:, None]
        if self.functionals is None:
            drops: Tensor = torch.linalg.vector_norm(difference.flatten(2), dim=-1, keepdim=True)
        else:
            drops = -torch.matmul(difference, self.functionals.mT)
        return drops / self.budgets[:, None]

    def shares_and_cotangent(
        self, output: Float[Tensor, "p r n e"], target: Int[Tensor, "p r"]
    ) -> tuple[Float[Tensor, "p r c"], Float[Tensor, "p r n e"]]:
        """Shares, and the derivative of the share ``target`` with respect to the output."""
        shares = self.shares(output)
        if self.functionals is None:
            difference = self.pool(output) - self.clean[:, None]
            scale = self.budgets[:, None] ** 2 * shares  # = budget * norm of the difference
            scale = torch.where(scale > 0, scale, math.inf).reshape(*scale.shape[:2], *(1,) * (difference.ndim - 2))
            return shares, self.unpool(difference / scale)
        rows = torch.arange(target.shape[0], device=target.device)[:, None]
        return shares, self.unpool(-self.functionals[rows, target] / self.budgets[rows, target][..., None])


def _present(value: Tensor | None) -> Tensor:
    assert value is not None  # noqa: S101 - group_key separates problems with and without it; narrows the type
    return value
