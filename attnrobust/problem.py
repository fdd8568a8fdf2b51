"""One robustness question: network, clean input, threat and goal. Both wings receive exactly this."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedThreatError, one_line
from attnrobust.goals import Goal, ResolvedGoal, parse_tolerance, require_computable, with_rounding
from attnrobust.layers.rounding import output_rounding
from attnrobust.layers.token_map import TokenMap, require_layer
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import MoveThreat
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import TokenMeasure

__all__ = ["Problem", "TokenMap"]


@dataclass(frozen=True, eq=False)
class Problem:
    """How far must (attack) or may (certificate) the tokens of one input move before the goal fails?

    Args:
        network: The layer.
        clean: The clean input; bare tokens (a tensor, an array, lists) get equal masses.
        threat: What may change and how it is measured: moved tokens, token measures, or copies; also its spelling, such
            as "frobenius".
        goal: What must stay true; also a tolerance of the whole output, such as "10%" or 0.1.

    Raises:
        InputError: Width mismatch, a threat that does not fit the input, a network output that is not finite, a budget
            that overflows or is lost in the rounding of the output.
        AlreadyViolatedError: The goal fails at the clean input.
    """

    network: TokenMap
    clean: TokenMeasure
    threat: Threat
    goal: Goal

    def __post_init__(self) -> None:
        require_layer(self.network)
        if not isinstance(self.clean, TokenMeasure):
            object.__setattr__(self, "clean", TokenMeasure(self.clean))
        if isinstance(self.threat, str):
            object.__setattr__(self, "threat", parse_threat(self.threat))
        if not isinstance(self.threat, Threat):
            raise InputError(
                f"the threat is {one_line(self.threat)}; give FrobeniusBall() or a name such as 'frobenius'"
            )
        if not isinstance(self.goal, Goal):
            object.__setattr__(self, "goal", parse_tolerance(str(self.goal)))
        if self.clean.width != self.network.width:
            raise InputError(f"the tokens have width {self.clean.width}, the layer takes {self.network.width}")
        self.threat.check(self.clean)
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
    def _stated(self) -> ResolvedGoal:
        """The goal's budgets as they are computed.

        A network that pools its rows says what mass each output row has.
        """
        output_mass = getattr(self.network, "output_mass", None)
        mass = self.clean.mass if output_mass is None else output_mass(self.mass, self.clean.n)
        stated = self.goal.resolve(self.clean_output, mass)
        require_computable(stated)
        return stated

    @cached_property
    def resolved(self) -> ResolvedGoal:
        """The goal's budgets at the clean output, with what they round."""
        return with_rounding(self._stated, self.goal, self.clean_output, self.output_rounding)

    @cached_property
    def output_rounding(self) -> Float[Tensor, "n e"]:
        """How far the entries of the clean output may be from their exact values (an estimate in rows of no weight)."""
        return self._rounding(self.clean.points, self.clean_output)

    def _rounding(self, points: Tensor, output: Tensor) -> Float[Tensor, "n e"]:
        return output_rounding(self.network, points, self.mass, output, asked=self._stated.weights)

    def usage_rounding(self, perturbed: Float[Tensor, "n d"]) -> float:
        """What rounding may have added to the used share at these tokens beyond what ``resolved.noise`` covers."""
        goal = self.resolved
        output = self.network(perturbed, self.mass)
        error = self._rounding(perturbed, output)
        here = goal.pooled_rounding(self.clean_output, self.output_rounding)
        noise = goal.change_rounding(output, here, goal.pooled_rounding(output, error))
        if goal.rounding is not None:
            noise = noise + goal.rounding
        excess = noise if goal.noise is None else noise - goal.noise
        return max(0.0, float((excess / goal.violated_at).max()))

    def usage(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Used share of the goal's budget at moved tokens; >= 1 is a violation. Differentiable."""
        return self.resolved.usage(self.network(self.clean.points + delta, self.mass))

    @property
    def moves(self) -> MoveThreat:
        """The threat, where it is one on moved tokens.

        Raises:
            UnsupportedThreatError: A threat on measures or copies.
        """
        if not isinstance(self.threat, MoveThreat):
            raise UnsupportedThreatError(f"the threat {self.threat.key!r} does more than move tokens")
        return self.threat

    @cached_property
    def digest(self) -> str:
        """SHA-256 over network, clean input, threat and goal; results of different problems never compare."""
        return self.threat.digest(self._digest_of_moves)

    def _digest_of_moves(self, key: str) -> str:
        parts = (self.network.digest, self.clean.digest(), key, self.goal.digest)
        return hashlib.sha256(";".join(parts).encode()).hexdigest()


def require_problem(problem: object) -> None:
    """Refuse what is no problem.

    Raises:
        InputError: With the way to make one.
    """
    if not isinstance(problem, Problem):
        kind = f"a {type(problem).__name__}"
        raise InputError(f"the problem is {kind}; give attnrobust.Problem(layer, tokens, threat, goal)")


def refuse_second_threat(options: Mapping[str, object]) -> None:
    """Refuse ``threat=`` beside a problem, which earlier versions took, and options that do not exist.

    Raises:
        InputError: ``threat=``.
        TypeError: Another option.
    """
    if "threat" in options:
        raise InputError("threat= is gone: give the threat to the problem, Problem(network, clean, threat, goal)")
    for name in options:
        raise TypeError(f"got an unexpected keyword argument {name!r}")
