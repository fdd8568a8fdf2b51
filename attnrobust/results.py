"""Frozen result records of attacks, certificates and their comparison."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attnrobust.figure import sides_plot
from attnrobust.notebook import Picture, Shown, number
from attnrobust.numerics.chance import union_bound
from attnrobust.status import Kind, Status
from attnrobust.text import shown_bound
from attnrobust.tokens import PerturbedTokens

__all__ = ["AttackResult", "Certificate", "CertificationReport", "Comparison", "Kind", "NotApplicable", "Status"]


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult(Shown):
    """What an attack found; ``radius`` is re-measured by the template, an UPPER bound of the true robust radius.

    Args:
        problem: Digest of the problem.
        attack: Name of the attack.
        status: FOUND only after re-evaluation in float64.
        radius: Threat distance of the verified point; infinity if none. With a fixed epsilon, that of the strongest
            point.
        usage: Share of the goal's budget used at ``perturbed`` (>= 1 is a violation).
        perturbed: The tokens (n, d), or the atoms (m, d) of split or copied tokens; None where nothing was found.
        queries: Forward evaluations of single inputs.
        seconds: Wall time.
        seed: The seed of this run.
        epsilon: The fixed budget, or None for the minimal-radius mode.
        note: What went wrong (status ERROR), or empty.
        atoms: The atoms with masses and parents where tokens were split or copied; None elsewhere.
        moving_radius: Radius that moving alone reached in the same units (infinity if it failed), or at a fixed epsilon
            the budget that moving alone used; NaN for attacks that only move.
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
    atoms: PerturbedTokens | None = None
    moving_radius: float = math.nan

    @property
    def gain(self) -> float:
        """How much better than moving alone, >= 1: ratio of radii, or at a fixed epsilon of used budgets; or NaN."""
        if self.epsilon is not None:
            return self.usage / self.moving_radius
        return self.moving_radius / self.radius if self.radius > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the tokens stay in ``perturbed``."""
        return {
            "attack": self.attack, "status": str(self.status), "radius": number(self.radius),
            "usage": number(self.usage), "queries": self.queries, "seconds": self.seconds, "seed": self.seed,
            "epsilon": self.epsilon, "note": self.note or None, "problem": self.problem,
        }  # fmt: skip

    def __repr__(self) -> str:
        """One line, without tensors."""
        return f"<{self.summary()}>"


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
    """A certificate that does not speak about this problem, and why.

    Args:
        method: Name of the certificate.
        reason: Why it was skipped.
        declared: Whether it speaks about such layers, threats and goals, so that the reason is about this problem.
    """

    method: str
    reason: str
    declared: bool = True


@dataclass(frozen=True, repr=False)
class CertificationReport(Shown):
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

    @property
    def why_none(self) -> str:
        """Why there is no certificate, from the methods that speak about such problems; empty if there is one."""
        if self.certificates:
            return ""
        reasons = dict.fromkeys(s.reason for s in self.skipped if s.declared)
        return "no certificate: " + ("; ".join(reasons) or "none speaks about this layer, threat and goal")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; certificates and the reasons of the skipped ones are lists of records."""
        best = self.best
        return {
            "best": None if best is None else best.method, "radius": None if best is None else best.radius,
            "kind": None if best is None else str(best.kind), "failure_probability": self.failure_probability,
            "seconds": self.seconds, "problem": self.problem,
            "certificates": [
                {"method": c.method, "radius": c.radius, "kind": str(c.kind), "reference": c.reference,
                 "failure_probability": c.failure_probability, "seconds": c.seconds}
                for c in self.certificates
            ],
            "skipped": [{"method": s.method, "reason": s.reason} for s in self.skipped if s.declared],
        }  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """One line for each certificate."""
        return list(self.to_dict()["certificates"])

    def __repr__(self) -> str:
        """One line with the best certificate."""
        return f"<{self.summary()}>"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Shown):
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values of both sides: the radii, the gap, every certificate."""
        best = self.certification.best
        return {
            "status": str(self.status), "certified_radius": 0.0 if best is None else best.radius,
            "certificate": None if best is None else best.method, "attack": self.attack.attack,
            "attack_radius": number(self.attack.radius) if self.attack.status is Status.FOUND else None,
            "gap": number(self.gap), "problem": self.problem,
            "certificates": self.certification.to_dict()["certificates"],
        }  # fmt: skip

    def plot(self) -> Picture:
        """Draw every certified radius and the attack's; the true robust radius lies between the two colours."""
        certified = {one.method: one.radius for one in self.certification.certificates}
        found = self.attack.radius if self.attack.status is Status.FOUND else math.inf
        title = f"{self.status}, gap {shown_bound(self.gap, up=True)}, problem {self.problem[:12]}"
        return Picture(sides_plot(certified, {self.attack.attack: found}, title=title), title)

    def __repr__(self) -> str:
        """One line with both radii and the gap."""
        return f"<{self.summary()}>"
