"""The one template of all certificates: a bound on the used budget becomes a radius and a record."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from attnrobust.certify.radius import largest_radius
from attnrobust.numerics.chance import stream
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Certificate, CertificationReport, Kind, NotApplicable

Question_contra = TypeVar("Question_contra", contravariant=True)


class PreparedBound(ABC):
    """One method at one problem; the work at the clean input is done once, at construction.

    ``usage(r)`` is an UPPER bound of ``sup problem.usage(D)`` over ``threat.distance(D) <= r``. Because the claim at r
    is about the whole set of size r, any r with ``usage(r).value <= 1`` is a certified radius; monotonicity is not
    needed.
    """

    @abstractmethod
    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share of the budget on the whole set of this radius (inf where it says nothing)."""

    @property
    def failure_probability(self) -> float:
        """Union bound over every random event that any evaluation so far relied on (0: deterministic)."""
        return 0.0

    @property
    def first_guess(self) -> float | None:
        """A radius near which the search starts, if one is known."""
        return None


class CertificateMethod(ABC):
    """A certificate: a bound with its reference, region and kind.

    Subclasses set the class variables and implement ``refuses`` and ``prepare``.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    region: ClassVar[str]
    kind: ClassVar[Kind] = Kind.FLOAT64
    relative_tolerance: ClassVar[float] = 1e-3
    """The search stops once the certified radius is within this share of a radius that failed."""

    @abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """Why this method does not speak about the problem exactly; None if it does."""

    @abstractmethod
    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        """Do the work at the clean input."""

    def certify(self, problem: Problem, *, seed: int = 0) -> Certificate:
        """Largest radius that this method certifies (safe end of the search).

        Args:
            problem: The question.
            seed: Seed of random start vectors (probabilistic methods only).

        Returns:
            A certificate; its radius is a lower bound of the true robust radius (0 if nothing could be certified).
        """
        start = time.perf_counter()
        bound = self.prepare(problem, seed=stream(seed, self.name, problem.digest))
        # Ball arithmetic encloses the budgets itself; the others divide by the computed ones.
        outward = 1.0 if self.kind is Kind.RIGOROUS else problem.resolved.outward
        return searched_certificate(self, bound, digest=problem.digest, kind=self.kind, start=start, outward=outward)


@runtime_checkable
class Described(Protocol):
    """What a certificate tells of its method."""

    name: ClassVar[str]
    reference: ClassVar[str]
    region: ClassVar[str]
    relative_tolerance: ClassVar[float]


def searched_certificate(
    method: Described, bound: PreparedBound, *, digest: str, kind: Kind, start: float, outward: float = 1.0
) -> Certificate:
    """Certificate with the largest radius of a prepared bound (safe end of the search).

    Args:
        method: Tells name, reference, region and tolerance of the search.
        bound: The bound at the clean input.
        digest: Question that the certificate answers.
        kind: Kind of the claim if no random event is relied on.
        start: ``time.perf_counter()`` before the bound was prepared.
        outward: Factor >= 1 on every used share, for a rounding that the bound does not know.

    Returns:
        A certificate; its radius is a lower bound of the true robust radius (0 if nothing could be certified).
    """
    radius, evaluations = largest_radius(
        lambda r: bound.usage(r).value * outward,
        first_guess=bound.first_guess,
        relative_tolerance=method.relative_tolerance,
    )
    failure = bound.failure_probability
    return Certificate(
        problem=digest,
        method=method.name,
        kind=Kind.PROBABILISTIC if failure > 0 else kind,
        failure_probability=failure,
        radius=radius,
        region=method.region,
        reference=method.reference,
        seconds=time.perf_counter() - start,
        evaluations=evaluations,
    )


def certify_with(problem: Problem, methods: Sequence[CertificateMethod], *, seed: int = 0) -> CertificationReport:
    """Run several methods on one problem; the ones that refuse are listed with their reason."""
    return answered(problem, methods, digest=problem.digest, seed=seed)


@runtime_checkable
class Answering(Protocol[Question_contra]):
    """A method that answers questions of one kind, or says why it does not."""

    name: ClassVar[str]

    def refuses(self, question: Question_contra, /) -> str | None:
        """Why this method does not speak about the question exactly; None if it does."""

    def certify(self, question: Question_contra, /, *, seed: int) -> Certificate:
        """Largest radius that this method certifies."""


def answered(
    question: Question_contra, methods: Sequence[Answering[Question_contra]], *, digest: str, seed: int
) -> CertificationReport:
    """Run several methods on one question with this digest; the ones that refuse are listed with their reason."""
    start = time.perf_counter()
    done: list[Certificate] = []
    skipped: list[NotApplicable] = []
    for method in methods:
        reason = method.refuses(question)
        if reason is None:
            done.append(method.certify(question, seed=seed))
        else:
            skipped.append(NotApplicable(method=method.name, reason=reason))
    return CertificationReport(digest, tuple(done), tuple(skipped), time.perf_counter() - start)
