"""Frozen result records of attacks, certificates and their comparison."""

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.chance import union_bound


class Status(StrEnum):
    """How one row ended."""

    FOUND = "found"  # a verified violation (attack), gap known (comparison)
    CERTIFIED = "certified"  # certificates alone; no attack was asked for
    NOT_FOUND = "not_found"  # the attack found no violation within its budget
    MISCLASSIFIED = "misclassified"  # the goal fails at the clean input; both radii are 0
    NAN = "nan"  # the search met NaN or infinity and has nothing verified
    TIMEOUT = "timeout"
    ERROR = "error"
    UNSOUND = "unsound"  # a verified attack inside a certified radius


class Kind(StrEnum):
    """How far a certificate is proved."""

    FLOAT64 = "float64"  # exact-arithmetic proof evaluated in float64
    RIGOROUS = "rigorous"  # outward rounding end to end
    PROBABILISTIC = "probabilistic"  # holds with a stated failure probability


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found; ``radius`` is re-measured by the template, an UPPER bound of the true robust radius.

    Args:
        problem: Digest of the problem.
        attack: Name of the attack.
        status: FOUND only after re-evaluation in float64.
        radius: Threat distance of the verified point; infinity if none. With a fixed epsilon, that of the strongest
            point.
        usage: Share of the goal's budget used at ``perturbed`` (>= 1 is a violation).
        perturbed: The tokens (n, d), or None.
        queries: Forward evaluations of single inputs.
        seconds: Wall time.
        seed: The seed of this run.
        epsilon: The fixed budget, or None for the minimal-radius mode.
        note: What went wrong (status ERROR), or empty.
    """

    problem: str
    attack: str
    status: Status
    radius: float
    usage: float
    perturbed: Float[Tensor, "n d"] | None
    queries: int
    seconds: float
    seed: int
    epsilon: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Certificate:
    """A certified radius: a LOWER bound of the true robust radius.

    Args:
        problem: Digest of the problem.
        method: Name of the certificate.
        kind: How far it is proved.
        failure_probability: 0 unless ``kind`` is probabilistic.
        radius: For every perturbation with threat distance <= radius the goal holds.
        region: On what set the claim holds, in words.
        reference: Paper and statement, or "derived" with the place of the proof.
        seconds: Wall time.
        evaluations: Evaluations of the bound during the radius search.
    """

    problem: str
    method: str
    kind: Kind
    failure_probability: float
    radius: float
    region: str
    reference: str
    seconds: float
    evaluations: int


@dataclass(frozen=True)
class NotApplicable:
    """A certificate that does not speak about this problem, and why."""

    method: str
    reason: str


@dataclass(frozen=True)
class CertificationReport:
    """All certificates of one problem; ``best`` has the largest radius.

    Args:
        problem: Digest of the problem.
        certificates: Every certificate that applies, in the order of evaluation.
        skipped: The ones that do not apply.
        seconds: Wall time of all together.
    """

    problem: str
    certificates: tuple[Certificate, ...]
    skipped: tuple[NotApplicable, ...]
    seconds: float

    @property
    def failure_probability(self) -> float:
        """What all certificates together may fail with, at most 1e-9.

        ``best`` is the largest of several, so its claim rests on all of them and fails with this probability, not with
        its own. The rows of a run add up (``attnrobust.numerics.chance.union_bound``).
        """
        return union_bound(c.failure_probability for c in self.certificates)

    @property
    def best(self) -> Certificate | None:
        """The certificate with the largest radius (deterministic before probabilistic on ties), or None.

        Its own ``failure_probability`` is for a certificate that was chosen before its radius was seen; the report's is
        for this one.
        """
        return max(self.certificates, key=lambda c: (c.radius, -c.failure_probability), default=None)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Attack against certificate on one problem.

    Args:
        problem: Digest of the problem.
        attack: The attack's result.
        certification: All certificates.
        status: FOUND, the attack's other status, or UNSOUND.
        gap: attack radius / best certified radius, >= 1; infinity if either side is missing (null in JSON,
            which has no infinity).
    """

    problem: str
    attack: AttackResult
    certification: CertificationReport
    status: Status
    gap: float
