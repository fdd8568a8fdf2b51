"""The certificates of the attention alone, on a ball around the image of the threat's set under the norm."""

import math
from typing import ClassVar

from attnrobust.certify.displacement.any_token import TOKEN_LIMIT, AnyTokenBound
from attnrobust.certify.displacement.bound import DisplacementBound
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.one_token.method import TokenBound
from attnrobust.certify.method import PRE_NORM_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.pre_norm.displacement import PreNormDisplacementBound
from attnrobust.certify.pre_norm.question import front_of, normalised, own_slopes
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.numerics.rounding import ENTRY, outward
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall


class PreNormScales(CertificateMethod):
    """Normalised tokens move by at most ``c(r) r``; there a certificate of the attention says what the goal loses.

    ``usage(r) <= usage_attention(c(r) r) + r slope / budget``, where c(r) bounds the chord of the sphere on which the
    norm puts a token, and the slope is that of the tokens themselves where they are added to the output.

    References:
        Derived; docs/pre-norm-certificates.md, theorem 1.
    """

    name: ClassVar[str] = "pre-norm-scales"
    reference: ClassVar[str] = "derived; docs/pre-norm-certificates.md, theorem 1"
    region: ClassVar[str] = "every move of hidden states with threat distance at most the radius"
    relative_tolerance: ClassVar[float] = 3e-3
    layers = (PreNormAttention,)
    features = PRE_NORM_FEATURES

    def refuses_more(self, problem: Problem) -> str | None:
        if isinstance(problem.threat, PerTokenBall) and problem.threat.norm != "l2":
            return "the norm's image of a token's box is not bounded more sharply than that of its ball"
        return None

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        if isinstance(problem.threat, FrobeniusBall) and problem.resolved.functionals is None:
            return PreNormDisplacementBound(problem, seed=seed)
        return ScalesBound(problem, seed=seed)


class ScalesBound(PreparedBound):
    """The attention's own bound at the normalised tokens, and the norm's slope."""

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.front = front_of(problem)
        self.inner = _bound_of(normalised(problem), seed=seed)
        self.own = float((own_slopes(problem) / problem.resolved.budgets).max())

    @property
    def failure_probability(self) -> float:
        return self.inner.failure_probability

    @property
    def first_guess(self) -> float | None:
        guess = self.inner.first_guess
        return None if guess is None else 1.0 / (self.front.steepest / guess + self.own)

    @property
    def growth(self) -> float:
        return self.inner.growth

    def usage(self, radius: float) -> Upper:
        size = self.front.steepness(radius) * radius
        if size == math.inf:
            return Upper(math.inf)
        inner = self.inner.usage(outward(size, ENTRY))
        return Upper(outward(inner.value + radius * self.own, ENTRY), inner.failure_probability)


def _bound_of(problem: Problem, *, seed: int) -> PreparedBound:
    """The sharpest certificate of the attention for this goal and threat."""
    n = problem.clean.n
    if problem.resolved.functionals is None:
        if isinstance(problem.threat, AnyToken) and n <= TOKEN_LIMIT:
            return AnyTokenBound(problem, seed, PreNormScales.relative_tolerance, sharp=True)
        return DisplacementBound(problem, seed, sharp=True)
    if isinstance(problem.threat, AnyToken) or int(problem.moves.movable(n).sum()) == 1:
        return TokenBound(problem)
    return MarginBound(problem, seed=seed)
