"""The template of certificates for perturbed token measures."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from attnrobust.certify.measures.question import MeasureQuestion
from attnrobust.certify.method import PreparedBound, answered, searched_certificate
from attnrobust.errors import UnsupportedThreatError
from attnrobust.layers.attention import Attention
from attnrobust.numerics.chance import stream
from attnrobust.results import Certificate, CertificationReport, Kind
from attnrobust.threats.measures import Copies
from attnrobust.tokens import MASS_SUM_TOLERANCE

OUTWARD_MASS = 1.0 + 8.0 * MASS_SUM_TOLERANCE
"""Room on every used share; token measures divide their masses by the sum, so the bounds do not rest on it."""


class MeasureMethod(ABC):
    """A certificate for measures: a bound of the used budget on the whole set of measures of a given size."""

    name: ClassVar[str]
    reference: ClassVar[str]
    region: ClassVar[str]
    relative_tolerance: ClassVar[float] = 1e-3

    @abstractmethod
    def refuses(self, question: MeasureQuestion) -> str | None:
        """Why this method does not speak about the question exactly; None if it does."""

    @abstractmethod
    def prepare(self, question: MeasureQuestion, *, seed: int) -> PreparedBound:
        """Do the work at the clean input."""

    def certify(self, question: MeasureQuestion, *, seed: int = 0) -> Certificate:
        """Largest radius that this method certifies (safe end of the search).

        Args:
            question: The question.
            seed: Seed of random start vectors (probabilistic norms only).

        Returns:
            A certificate; for every measure of the threat with distance <= radius the goal holds.
        """
        start = time.perf_counter()
        bound = self.prepare(question, seed=stream(seed, self.name, question.digest))
        return searched_certificate(
            self,
            bound,
            digest=question.digest,
            kind=Kind.FLOAT64,
            start=start,
            outward=OUTWARD_MASS * question.problem.resolved.outward,
        )


def certify_question(
    question: MeasureQuestion, methods: Sequence[MeasureMethod], *, seed: int = 0
) -> CertificationReport:
    """Run several methods on one question.

    Raises:
        UnsupportedThreatError: None of them applies; the message holds every reason.
    """
    report = answered(question, methods, digest=question.digest, seed=seed)
    if not report.certificates:
        reasons = "; ".join(f"{s.method}: {s.reason}" for s in report.skipped)
        raise UnsupportedThreatError(f"no certificate speaks about {question.threat.key!r} here: {reasons}")
    return report


def order_of(question: MeasureQuestion) -> float:
    """Order p of the distance; 0 for copies, which have none."""
    return 0.0 if isinstance(question.threat, Copies) else float(question.threat.order)


def attention_in(question: MeasureQuestion) -> Attention:
    """The attention layer, after ``refuses`` returned None."""
    layer = question.problem.network
    if not isinstance(layer, Attention):
        raise TypeError(f"{type(layer).__name__} is not an attention layer; ask refuses() first")
    return layer


def refuse_layer(question: MeasureQuestion, *, masks: bool) -> str | None:
    """Why a bound for one attention layer does not speak about the question; None if it does."""
    layer = question.problem.network
    if not isinstance(layer, Attention):
        return f"it speaks about a single dot-product attention layer, not {type(layer).__name__}"
    if not masks and (layer.causal or layer.mask is not None):
        return "it speaks about attention without any mask; coupling:inf has certificates for masks"
    return None


def refuse_order(question: MeasureQuestion, *orders: float) -> str | None:
    """Why a bound for some orders p does not speak about the question; None if it does."""
    order = order_of(question)
    if order in orders:
        return None
    names = " or ".join("inf" if math.isinf(p) else f"{p:g}" for p in orders)
    return f"it speaks about balls of measures with p = {names}, not {question.threat.key!r}"
