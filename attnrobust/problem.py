"""One robustness question: network, clean input, threat and goal. Both wings receive exactly this."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.goals import Goal, ResolvedGoal
from attnrobust.layers.token_map import TokenMap
from attnrobust.threats.moves import Threat
from attnrobust.tokens import TokenMeasure

__all__ = ["Problem", "TokenMap"]


@dataclass(frozen=True, eq=False)
class Problem:
    """How far must (attack) or may (certificate) the tokens of one input move before the goal fails?

    Args:
        network: The layer.
        clean: The clean input.
        threat: What may move and how it is measured.
        goal: What must stay true.

    Raises:
        InputError: Width mismatch, a threat token that does not exist, a network output that is not finite.
        AlreadyViolatedError: The goal fails at the clean input.
    """

    network: TokenMap
    clean: TokenMeasure
    threat: Threat
    goal: Goal

    def __post_init__(self) -> None:
        if self.clean.width != self.network.width:
            raise InputError(f"the tokens have width {self.clean.width}, the layer takes {self.network.width}")
        self.threat.movable(self.clean.n)
        if not bool(torch.isfinite(self.clean_output).all()):
            raise InputError("the layer's output at the clean input is not finite; its scores or values overflow")
        _ = self.resolved

    @cached_property
    def mass(self) -> Float[Tensor, "n"] | None:
        """Masses to hand to the network: None where they are equal and cancel."""
        return None if self.clean.uniform else self.clean.mass

    @cached_property
    def clean_output(self) -> Float[Tensor, "n e"]:
        """The network at the clean input."""
        return self.network(self.clean.points, self.mass)

    @cached_property
    def resolved(self) -> ResolvedGoal:
        """The goal's budgets at the clean output."""
        return self.goal.resolve(self.clean_output, self.clean.mass)

    def usage(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Used share of the goal's budget at moved tokens; >= 1 is a violation. Differentiable."""
        return self.resolved.usage(self.network(self.clean.points + delta, self.mass))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over network, clean input, threat and goal; results of different problems never compare."""
        parts = (self.network.digest, self.clean.digest(), self.threat.key, self.goal.digest)
        return hashlib.sha256(";".join(parts).encode()).hexdigest()
