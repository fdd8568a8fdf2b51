"""Displacement certificate: exact first order, proved second-order remainder, one joint eigenvalue bound."""

from typing import ClassVar

from attnrobust.certify.displacement.any_token import TOKEN_LIMIT, AnyTokenBound
from attnrobust.certify.displacement.bound import DisplacementBound
from attnrobust.certify.method import MODERN_FEATURES, CertificateMethod, PreparedBound
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken

__all__ = ["DisplacementBound", "DisplacementCertificate"]


class DisplacementCertificate(CertificateMethod):
    """Displacement of one attention layer: ``r ||J||`` exactly, plus a remainder that vanishes like r^2.

    Holds for multi-head dot-product attention with masks, masses, biases and output projection.

    References:
        Derived; proof in docs/displacement-certificate.md.
    """

    name: ClassVar[str] = "displacement"
    reference: ClassVar[str] = "derived; docs/displacement-certificate.md, theorem 1"
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"
    layers = (Attention,)
    features = MODERN_FEATURES
    goals = (Displacement,)
    relative_tolerance: ClassVar[float] = 5e-3
    """The predicted radius is this accurate; a second proof would cost as much as everything before it."""

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        if isinstance(problem.threat, AnyToken) and problem.clean.n <= TOKEN_LIMIT:
            return AnyTokenBound(problem, seed, self.relative_tolerance)
        return DisplacementBound(problem, seed)
