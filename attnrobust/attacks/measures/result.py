"""What an attack on token measures found."""

from dataclasses import dataclass

from attnrobust.problem import Problem
from attnrobust.results import AttackResult
from attnrobust.threats.measures import PerturbedTokens, question_digest


@dataclass(frozen=True, eq=False)
class MeasureAttackResult(AttackResult):
    """An attack result whose input may have more atoms than tokens; ``problem`` is the digest of problem AND budget.

    It answers another question than a token-moving result, so the two digests differ and no certificate of a
    token-moving threat can be compared with it by mistake.

    Args:
        threat: Key of the measure threat, or the description of the copies.
        atoms: The atoms with masses and parents; None where nothing was found.
        moving_radius: Radius that moving alone reached in the same units (infinity if it failed), or at a fixed epsilon
            the budget that moving alone used.
        source: Digest of the problem about the clean input.
    """

    threat: str = ""
    atoms: PerturbedTokens | None = None
    moving_radius: float = float("nan")
    source: str = ""

    @property
    def gain(self) -> float:
        """How much better than moving alone, >= 1: ratio of radii, or at a fixed epsilon of used budgets."""
        if self.epsilon is not None:
            return self.usage / self.moving_radius
        return self.moving_radius / self.radius if self.radius > 0 else float("inf")


def measure_digest(problem: Problem, threat: str) -> str:
    """Digest of a question about measures."""
    return question_digest(problem.digest, threat)
