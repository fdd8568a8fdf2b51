"""The one template of all certificates: what is declared is answered, a bound becomes a radius and a record."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from attnrobust.certify.radius import largest_radius
from attnrobust.errors import SoundnessError, UnsupportedModelError, UnsupportedThreatError, first_line
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.features import features_of
from attnrobust.numerics.chance import stream
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Certificate, CertificationReport, Kind, NotApplicable
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall

MOVES: tuple[type[Threat], ...] = (FrobeniusBall, PerTokenBall, AnyToken)
"""Every threat on moved tokens."""

ATTENTION_FEATURES = frozenset({"bias", "out_projection", "scale", "mask", "causal"})
"""Features of ``Attention`` whose scores are one bilinear form plus one mask of all heads."""

PLACED_FEATURES = ATTENTION_FEATURES | {"window", "head_bias"}
"""The same with every part that enters through the clean weights alone."""

MODERN_FEATURES = PLACED_FEATURES | {"rotary"}
"""Every feature of ``Attention`` today."""

PRE_NORM_FEATURES = MODERN_FEATURES | {"residual"}
"""Every feature of ``PreNormAttention`` today."""

HEAD_FEATURES = frozenset({"bias", "out_projection"})
"""Every feature of the other attention layers."""

UNCOVERED = "it does not cover"
"""Beginning of the reason of a method that speaks about such layers, but not about a feature of this one."""

FAILURES = (ValueError, LookupError, ArithmeticError, RuntimeError)
"""What the computation of a bound may raise without ending the other certificates (singular matrices, a library's
errors, memory of a device)."""


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

    @property
    def growth(self) -> float:
        """Roughly the exponent of the used share in the radius near the first guess; 1 where nothing is known."""
        return 1.0


class CertificateMethod(ABC):
    """A certificate: a bound with its reference, region and kind, and what it speaks about.

    Everything that is not declared is refused: a layer of another type (subclasses too), a feature of the layer, a
    threat or a goal that came later. Subclasses set the class variables, implement ``prepare``, and refuse finer
    conditions in ``refuses_more``.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    region: ClassVar[str]
    layers: ClassVar[tuple[type, ...]]
    features: ClassVar[frozenset[str]]
    """The features of those layers that the proof covers."""
    threats: ClassVar[tuple[type[Threat], ...]] = MOVES
    goals: ClassVar[tuple[type[Goal], ...]] = (Displacement, Margin)
    kind: ClassVar[Kind] = Kind.FLOAT64
    relative_tolerance: ClassVar[float] = 1e-3
    """The search stops once the certified radius is within this share of a radius that failed."""
    outward: ClassVar[float] = 1.0
    """Factor >= 1 on every used share, for a rounding that the bound does not know."""

    def refuses(self, problem: Problem) -> str | None:
        """Why this method does not speak about the problem exactly; None if it does."""
        return _undeclared(self, problem) or self.refuses_more(problem)

    def undeclared(self, problem: Problem) -> str | None:
        """What of the problem this method does not declare, by name; None if it speaks about such problems."""
        return _undeclared(self, problem)

    def refuses_more(self, problem: Problem) -> str | None:
        """Conditions beyond the declared layers, features, threats and goals; None where there are none."""
        return None

    def too_long(self, problem: Problem) -> str | None:
        """Why it is left out unless it is named, for a problem that is not refused: minutes of work; else None."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        """Do the work at the clean input of a problem that is not refused."""

    def certify(self, problem: Problem, *, seed: int = 0) -> Certificate:
        """Largest radius that this method certifies (safe end of the search).

        Args:
            problem: The question.
            seed: Seed of random start vectors (probabilistic methods only).

        Returns:
            A certificate; its radius is a lower bound of the true robust radius (0 if nothing could be certified).

        Raises:
            UnsupportedThreatError: The method does not speak about the problem.
        """
        reason = self.refuses(problem)
        if reason is not None:
            raise UnsupportedThreatError(f"certificate {self.name!r}: {reason}")
        return self._searched(problem, seed=seed)

    def _searched(self, problem: Problem, *, seed: int, ceiling: float = math.inf) -> Certificate:
        start = time.perf_counter()
        bound = self.prepare(problem, seed=stream(seed, self.name, problem.digest))
        # Ball arithmetic encloses the budgets itself; the others divide by the computed ones.
        outward = self.outward * (1.0 if self.kind is Kind.RIGOROUS else problem.resolved.outward)
        radius, evaluations = largest_radius(
            lambda r: bound.usage(r).value * outward,
            first_guess=bound.first_guess,
            growth=bound.growth,
            relative_tolerance=self.relative_tolerance,
            ceiling=ceiling,
        )
        failure = bound.failure_probability
        return Certificate(
            problem=problem.digest,
            method=self.name,
            kind=Kind.PROBABILISTIC if failure > 0 else self.kind,
            failure_probability=failure,
            radius=radius,
            region=self.region,
            reference=self.reference,
            seconds=time.perf_counter() - start,
            evaluations=evaluations,
        )

    def attempt(
        self, problem: Problem, *, seed: int, named: bool = True, ceiling: float = math.inf
    ) -> Certificate | NotApplicable:
        """The certificate, or why there is none: a refusal, a failure, or minutes of work that nobody named.

        Args:
            problem: The question.
            seed: As in ``certify``.
            named: Whether somebody asked for this certificate by its name.
            ceiling: A radius that no right certificate exceeds; see ``largest_radius``.
        """
        reason = _undeclared(self, problem)
        if reason is not None:
            return NotApplicable(method=self.name, reason=reason, declared=False)
        try:
            reason = self.refuses(problem) or (None if named else self.too_long(problem))
            if reason is not None:
                return NotApplicable(method=self.name, reason=reason)
            return self._searched(problem, seed=seed, ceiling=ceiling)
        except SoundnessError:
            raise
        except (UnsupportedThreatError, UnsupportedModelError) as refusal:
            return NotApplicable(method=self.name, reason=first_line(refusal))
        except FAILURES as error:
            return NotApplicable(method=self.name, reason=f"failed: {type(error).__name__}: {first_line(error)}")


def certify_with(
    problem: Problem,
    methods: Sequence[CertificateMethod],
    *,
    seed: int = 0,
    named: bool = True,
    watch: Callable[[str], object] | None = None,
) -> CertificationReport:
    """Run several methods on one problem, each told to ``watch``; those that refuse or fail are listed and say why."""
    start = time.perf_counter()
    answers: list[Certificate | NotApplicable] = []
    for method in methods:
        if watch is not None:
            watch(method.name)
        answers.append(method.attempt(problem, seed=seed, named=named))
    done = tuple(answer for answer in answers if isinstance(answer, Certificate))
    skipped = tuple(answer for answer in answers if isinstance(answer, NotApplicable))
    return CertificationReport(problem.digest, done, skipped, time.perf_counter() - start)


def _undeclared(method: CertificateMethod, problem: Problem) -> str | None:
    """What the method does not declare, by name."""
    if type(problem.network) not in method.layers:
        return f"it speaks about {_names(method.layers)} layers, not {type(problem.network).__name__}"
    unknown = features_of(problem.network) - method.features
    if unknown:
        return f"{UNCOVERED} {', '.join(sorted(unknown))} of {type(problem.network).__name__}"
    if type(problem.threat) not in method.threats:
        return f"it speaks about the threats {_names(method.threats)}, not {problem.threat.key!r}"
    if type(problem.goal) not in method.goals:
        return f"it speaks about the goals {_names(method.goals)}, not {type(problem.goal).__name__}"
    return None


def _names(types: Sequence[type]) -> str:
    return ", ".join(one.__name__ for one in types)
