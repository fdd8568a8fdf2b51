"""What every threat owes: a name, the tokens that it may touch, and how a question about it is digested."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from attnrobust.threats.token_subset import require_length
from attnrobust.tokens import TokenMeasure


class Threat(ABC):
    """A family of sets of perturbed inputs that grows with a size, the radius.

    Methods declare the threats that they handle by their exact types: a new threat, or a subclass, is refused by all of
    them until they do.
    """

    @property
    @abstractmethod
    def key(self) -> str:
        """Short unique name, the CLI's spelling (``parse_threat`` reads it back)."""

    @abstractmethod
    def movable(self, n: int) -> Bool[Tensor, "n"]:
        """Which tokens may move at all; raises InputError where an index does not exist."""

    @abstractmethod
    def digest(self, of_moves: Callable[[str], str]) -> str:
        """Digest of a question about this threat.

        Args:
            of_moves: The digest of the same question about moved tokens, from the key of a move threat.
        """

    @property
    def rounding_factor(self) -> float:
        """How many times a relative error of the used budget may count in a radius."""
        return 1.0

    def check(self, clean: TokenMeasure) -> None:
        """Refuse clean inputs that the threat does not fit.

        Raises:
            InputError: A token that does not exist, or one outside of the threat's domain.
        """
        self.movable(clean.n)


def selection(tokens: tuple[int, ...] | None, n: int, device: torch.device | None = None) -> Bool[Tensor, "n"]:
    """A subset of n tokens as a mask.

    Raises:
        InputError: An index that does not exist, a mask of another length.
    """
    if tokens is None:
        return torch.ones(n, dtype=torch.bool, device=device)
    require_length(tokens, n)
    chosen = torch.zeros(n, dtype=torch.bool, device=device)
    chosen[list(tokens)] = True
    return chosen


def token_list(tokens: tuple[int, ...]) -> str:
    """A subset as keys spell it."""
    return ",".join(map(str, tokens))
