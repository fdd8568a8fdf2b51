"""Copies of tokens, which then move."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError, one_line
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import as_count

CausalOrder = Literal["tied", "strict"]
"""What a copy means under a causal mask: "tied", all copies of a token share its position and see each other;
"strict", a copy is an ordinary token inserted behind its parent, seen by later copies and by what follows."""

SHARED = FrobeniusBall()
"""How copies move by default: all atoms share one budget."""


@dataclass(frozen=True)
class Copies(Threat):
    """Up to a number of extra copies of tokens, in all; every atom then moves within a threat on moved tokens.

    A copy adds its token's mass to it: the perturbed measure has ``(1 + r_j) mass_j / sum`` on the atoms of token j,
    ``sum_j r_j <= copies``. Goals of all rows and of one row read the original tokens, the mean is over all atoms. The
    radius is that of the moves: 0 where the copies alone violate the goal.

    Args:
        copies: Most extra copies, >= 1.
        order: Meaning of a causal mask.
        moves: How the atoms move: a Frobenius ball (one budget for all of them together) or per-token balls. Which
            tokens may move says nothing about which ones are copied.
    """

    copies: int
    order: CausalOrder = "tied"
    moves: MoveThreat = SHARED

    def __post_init__(self) -> None:
        object.__setattr__(self, "copies", as_count("copies", self.copies))
        if self.order not in ("tied", "strict"):
            raise UnknownNameError("order of copies", str(self.order), ("tied", "strict"))
        if not isinstance(self.moves, MoveThreat):
            raise InputError(f"copies take a threat on moves; got {one_line(self.moves)}, give FrobeniusBall()")
        if type(self.moves) not in (FrobeniusBall, PerTokenBall):
            raise UnsupportedThreatError(
                f"copies do not go with the threat {self.moves.key!r}; use frobenius or per-token"
            )

    @property
    def key(self) -> str:
        order = "" if self.order == "tied" else f":{self.order}"
        moves = "" if self.moves == SHARED else f":{self.moves.key}"
        return f"copies:{self.copies}{order}{moves}"

    @property
    def rounding_factor(self) -> float:
        return 2.0

    def movable(self, n: int) -> Bool[Tensor, "n"]:
        return self.moves.movable(n)

    def digest(self, of_moves: Callable[[str], str]) -> str:
        text = f"{self.moves.key} copies:{self.copies} {self.order}"
        return hashlib.sha256(f"{of_moves(self.moves.key)};{text}".encode()).hexdigest()
