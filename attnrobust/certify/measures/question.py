"""Questions about perturbed token measures: what is asked, and what cannot be answered soundly."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.measures import DOMAIN_ROUNDING, Copies, CouplingBall, MeasureThreat, question_digest
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall


@dataclass(frozen=True, eq=False)
class MeasureQuestion:
    """How far may the token measure of one input change before the goal fails?

    Goals are read as the attacks on measures read them: the mass-weighted mean of all atoms, any atom of the goal's
    row, or for a displacement of all rows ``sqrt(n) W_2`` between the output measures. With ``Copies``, all rows and
    one row are the original tokens.

    Args:
        problem: Layer, clean input and goal; of its threat only the movable tokens count, except for ``Copies``.
        threat: The ball of measures, or the copies.

    Raises:
        UnsupportedThreatError: What cannot be bounded, with the cure.
        InputError: A clean token outside of the threat's domain.
    """

    problem: Problem
    threat: MeasureThreat | Copies

    def __post_init__(self) -> None:
        _ = self.row
        if isinstance(self.threat, Copies):
            _require_copies(self.problem, self.threat)
        else:
            self._require_measures(self.threat)

    def _require_measures(self, threat: MeasureThreat) -> None:
        parents = isinstance(threat, CouplingBall)
        masked = isinstance(self.problem.network, Attention) and (
            self.problem.network.mask is not None or self.problem.network.causal
        )
        if not parents and (masked or self.row is not None):
            what = "the layer's mask" if masked else "a goal on one row"
            raise UnsupportedThreatError(
                f"{what} needs to know which token an atom came from, and {threat.key!r} does not say; "
                f"use {CouplingBall(threat.order).key!r}, where every atom has a parent"
            )
        if math.isinf(threat.order):
            pass
        elif self.row is not None:
            raise UnsupportedThreatError(
                f"under {threat.key!r} an atom of row {self.row} with a tiny mass moves as far as it likes, so its "
                "output has no bound; use 'coupling:inf', or read the mean (pool 'mean')"
            )
        elif threat.domain_radius is None:
            raise UnsupportedThreatError(
                f"under {threat.key!r} a tiny mass moves as far as it likes; declare the largest norm of a token, as "
                f"in '{threat.key}:within:R' (domain_radius=R)"
            )
        if threat.domain_radius is not None and self.clean_radius > threat.domain_radius * (1.0 + DOMAIN_ROUNDING):
            raise InputError(
                f"a clean token has norm {self.clean_radius:.6g}, outside of the threat's domain of radius "
                f"{threat.domain_radius:.6g}; raise it"
            )

    @property
    def digest(self) -> str:
        """Digest of the question; attacks on measures carry the same."""
        text = self.threat.key
        return question_digest(
            self.problem.digest, f"{self.problem.threat.key} {text}" if isinstance(self.threat, Copies) else text
        )

    @cached_property
    def row(self) -> int | None:
        """The one row that the goal reads, or None."""
        pool = getattr(self.problem.goal, "pool", None)
        if pool is None:
            raise UnsupportedThreatError(
                f"goal {self.problem.goal.key!r} does not say which rows it reads; use Displacement or Margin"
            )
        return pool if isinstance(pool, int) else None

    @property
    def whole(self) -> bool:
        """Whether all rows count, as ``sqrt(n) W_2`` between output measures."""
        return self.problem.resolved.weights is None

    @cached_property
    def clean_radius(self) -> float:
        """Largest norm of a clean token."""
        return float(torch.linalg.vector_norm(self.problem.clean.points, dim=-1).max())

    def radius(self, size: float) -> float:
        """Radius of a ball around 0 that holds every atom of the threat of this size."""
        if isinstance(self.threat, Copies):
            return self.clean_radius + size * self.problem.threat.token_factor(*self.problem.clean.points.shape)
        reach = self.clean_radius + size if math.isinf(self.threat.order) else math.inf
        declared = math.inf if self.threat.domain_radius is None else self.threat.domain_radius
        # An atom on the boundary may round beyond it; the clean tokens themselves may have done so.
        return max(min(reach, declared * (1.0 + 2.0 * DOMAIN_ROUNDING)), self.clean_radius)


def _require_copies(problem: Problem, threat: Copies) -> None:
    if not isinstance(problem.threat, FrobeniusBall | PerTokenBall):
        raise UnsupportedThreatError(
            f"copies do not go with the threat {problem.threat.key!r}; use frobenius or per-token"
        )
    if threat.order == "strict" and getattr(problem.network, "causal", False):
        raise UnsupportedThreatError(
            "copies inserted behind their parents shift the rows of a causal layer; use order 'tied', where all copies "
            "of a token share its position"
        )
