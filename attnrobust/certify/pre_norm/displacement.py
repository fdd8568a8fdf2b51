"""The displacement certificate in the coordinates of the ellipsoids, with the tokens' own moves in its first order."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.bilinear import ValueLogitForm
from attnrobust.certify.displacement.bound import DisplacementBound
from attnrobust.certify.displacement.trial import JointForm
from attnrobust.certify.method import PreparedBound
from attnrobust.certify.pre_norm.question import front_of, normalised
from attnrobust.certify.pre_norm.sphere import Ellipsoids, NormFront
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import LinearMap
from attnrobust.numerics.rounding import ENTRY, outward
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem


@dataclass(frozen=True, eq=False)
class FrontProduct:
    """The joint form at ``T d'``, its first order with ``sum_i pi_i d'_i / s`` (the parts across the tokens) added.

    Args:
        inner: The attention's own.
        ellipsoids: T.
        jacobian: The pooled derivative of the attention.
        weights: Row weights pi, or None for all rows.
    """

    inner: JointForm
    ellipsoids: Ellipsoids
    jacobian: LinearMap
    weights: Float[Tensor, "n"] | None

    @property
    def value_form(self) -> ValueLogitForm:
        """As ``JointProduct``."""
        return self.inner.value_form

    def with_values(self, form: ValueLogitForm) -> "FrontProduct":
        """As ``JointProduct``."""
        return replace(self, inner=self.inner.with_values(form))

    def apply(
        self, moves: Float[Tensor, "n d"], forms: Any, factors: Float[Tensor, "5"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "5"]]:
        """As ``JointProduct``."""
        turned = self.ellipsoids.apply(moves)
        image, values = self.inner.apply(turned, forms, factors)
        image = self.ellipsoids.apply(image)
        if not self.ellipsoids.front.layer.residual:
            return image, values
        own, first = self._pooled(self._tangential(moves)), self.jacobian.matvec(turned)
        more = self._tangential(self._unpooled(own + first)) + self.ellipsoids.apply(self.jacobian.rmatvec(own))
        added = own.square().sum() + 2.0 * (own * first).sum()
        return image + factors[0] * more, torch.cat([values[:1] + added, values[1:]])

    def _tangential(self, moves: Tensor) -> Tensor:
        """Parts across the tokens that may move, in their own units; symmetric."""
        front = self.ellipsoids.front
        centred = front.layer.centred(moves * front.movable[:, None])
        return (centred - (centred * front.direction).sum(-1, keepdim=True) * front.direction) / front.steepest

    def _pooled(self, moves: Tensor) -> Tensor:
        return moves if self.weights is None else self.weights @ moves

    def _unpooled(self, output: Tensor) -> Tensor:
        return output if self.weights is None else self.weights[:, None] * output


class PreNormDisplacementBound(PreparedBound):
    """Frobenius balls: ``A |d'|`` from the joint form, and what the norm does not see beside it."""

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.front = front_of(problem)
        self.inner = DisplacementBound(normalised(problem), seed, sharp=True)
        self.guess = float(self.inner.first_guess or 0.0) / self.front.steepest
        self.ellipsoids = Ellipsoids.near(self.front, self.guess)
        layer, weights = self.front.layer.folded, problem.resolved.weights
        tokens = self.front.layer.unit(problem.clean.points)
        linear = AttentionJacobian(layer, tokens, problem.mass).linear_map(
            pool=weights, token_scale=self.front.movable.to(tokens)
        )
        self.inner.change_form(lambda form: FrontProduct(form, self.ellipsoids, linear, weights))
        self.own = _row_norm(self.front, weights) if self.front.layer.residual else 0.0
        self.budget = self.inner.budget

    @property
    def failure_probability(self) -> float:
        return self.inner.failure_probability

    @property
    def first_guess(self) -> float | None:
        return self.guess if self.guess > 0.0 else None

    def usage(self, radius: float) -> Upper:
        """``(A^2 + (|pi| / s)^2)^(1/2) R``, as ``|d'|^2 + z^2 <= R^2``, and the error of Lemma N3."""
        size = self.ellipsoids.reach(radius, free=self.front.layer.residual)
        if not size < torch.inf:
            return Upper(torch.inf)
        inner = self.inner.usage(size)
        beside = self.own * size / self.front.steepest / self.budget
        error = self.own * radius * float(self.front.shares(radius).max()) / self.budget
        value = math.hypot(inner.value, beside) + error
        return Upper(outward(value, ENTRY), inner.failure_probability)


def _row_norm(front: NormFront, weights: Tensor | None) -> float:
    """Norm of the pooling of rows: ``|sum_i pi_i d_i| <= |pi| |D|``, over the tokens that may move."""
    if weights is None:
        return 1.0
    return outward(float(torch.linalg.vector_norm(weights * front.movable)), ENTRY)
