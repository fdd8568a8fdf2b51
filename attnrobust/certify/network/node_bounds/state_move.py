"""How far one state of a network may have moved: norms of the whole, of every token and of every entry."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.rounding import nan_is_infinite


@dataclass(frozen=True, eq=False)
class StateMove:
    """Upper bounds of a move E of a state, at once: ``||E||_F``, every ``|E_i|`` and every ``|E_ik|``.

    Made by ``state_move``, which lets each bound sharpen the others.

    Args:
        frobenius: Bound of ``||E||_F``; inf says nothing.
        tokens: Bounds of ``|E_i|``, (n,).
        entries: Bounds of ``|E_ik|``, (n, d).
        image: Where E is an image ``E = E' W`` of an earlier move: that move and W. What is known of E' through W may
            say more than the three norms.
        scaled: Row factors (n,) and a bound of ``||diag(factors) E||_F``, where one is known.
    """

    frobenius: float
    tokens: Float[Tensor, "n"]
    entries: Float[Tensor, "n d"]
    image: "tuple[StateMove, Float[Tensor, 'c d']] | None" = None
    scaled: tuple[Float[Tensor, "n"], float] | None = None

    def within(self, frobenius: float) -> "StateMove":
        """The same move, of which another bound of ``||E||_F`` became known."""
        whole = min(self.frobenius, frobenius)
        return state_move(whole, self.tokens, self.entries, image=self.image, scaled=self.scaled)

    def plus(self, other: "StateMove") -> "StateMove":
        """The sum of two moves."""
        return state_move(self.frobenius + other.frobenius, self.tokens + other.tokens, self.entries + other.entries)

    def meet(self, other: "StateMove") -> "StateMove":
        """One move of which both hold."""
        return state_move(
            min(self.frobenius, other.frobenius),
            torch.minimum(self.tokens, other.tokens),
            torch.minimum(self.entries, other.entries),
            image=self.image or other.image,
            scaled=self.scaled or other.scaled,
        )


def state_move(
    frobenius: float,
    tokens: Float[Tensor, "n"],
    entries: Float[Tensor, "n d"],
    *,
    image: tuple[StateMove, Float[Tensor, "c d"]] | None = None,
    scaled: tuple[Float[Tensor, "n"], float] | None = None,
) -> StateMove:
    """A move of which all bounds hold; a token is no longer than the whole and no shorter than an entry."""
    if scaled is not None:
        tokens = torch.minimum(nan_is_infinite(tokens), nan_is_infinite(scaled[1] / scaled[0]))
    entries, tokens, whole = nan_is_infinite(entries), nan_is_infinite(tokens), tokens.new_tensor(frobenius)
    whole = nan_is_infinite(whole)
    tokens = torch.minimum(torch.minimum(tokens, torch.linalg.vector_norm(entries, dim=-1)), whole)
    return StateMove(
        frobenius=min(float(whole), float(torch.linalg.vector_norm(tokens))),
        tokens=tokens,
        entries=torch.minimum(entries, tokens[:, None]),
        image=image,
        scaled=scaled,
    )


def token_move(frobenius: float, tokens: Float[Tensor, "n"], width: int) -> StateMove:
    """A move of which nothing is known beyond the tokens and the whole."""
    return state_move(frobenius, tokens, tokens[:, None].expand(-1, width))


def no_move(like: Float[Tensor, "n d"]) -> StateMove:
    """Nothing moves."""
    return StateMove(0.0, torch.zeros_like(like[:, 0]), torch.zeros_like(like))


def scaled_move(move: StateMove, slopes: Float[Tensor, "n d"]) -> StateMove:
    """``E_ik`` times at most ``slopes_ik`` >= 0."""
    per_token = slopes.amax(dim=-1)
    return state_move(
        float(per_token.max()) * move.frobenius if move.frobenius > 0.0 else 0.0,
        per_token * move.tokens,
        slopes * move.entries,
    )
