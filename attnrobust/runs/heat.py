"""Which tokens of a sentence break the goal: by their own attack radii, else by the attack's move."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from attnrobust.runs.rows import Row

TOP_TOKENS, TOP_SHARE = 5, 0.05
"""At most so many tokens of a line are marked, and only those with at least this share."""

_SPECIAL = re.compile(r"\[[A-Z]{2,}\d*\]|</?[A-Za-z][\w:-]*>|<\|[^<>|]+\|>|<\u2581?[\w-]+\u2581[\w\u2581-]+>")


@dataclass(frozen=True)
class HeatToken:
    """One token of a line.

    Args:
        text: The token.
        share: Its part of the attack's squared move, 0 to 1; 0 of a line by radii.
        strength: Relative to the strongest token of the line, 0 to 1; the colour.
        top: Whether it is marked, not by colour alone: one of the strongest ``TOP_TOKENS`` with ``TOP_SHARE`` or more.
        radius: Its own attack radius; None of a line by moves, and where none was found.
    """

    text: str
    share: float
    strength: float
    top: bool
    radius: float | None = None


@dataclass(frozen=True)
class HeatLine:
    """One row's tokens.

    Args:
        row: The row.
        tokens: Its tokens in order.
        strongest: The strongest tokens, strongest first.
        by_radius: Whether the colours are each token's own attack radius, not the attack's move.
    """

    row: Row
    tokens: tuple[HeatToken, ...]
    strongest: tuple[HeatToken, ...]
    by_radius: bool = False


@dataclass(frozen=True)
class HeatSentence:
    """All lines of one input.

    Args:
        input_id: The input.
        lines: One per layer, threat and goal, the most vulnerable (smallest attack radius) first.
    """

    input_id: str
    lines: tuple[HeatLine, ...]


def is_special(token: str) -> bool:
    """Whether a token is written as tokenizers write those that stand for no text: ``[CLS]``, ``</s>``, ``<|end|>``."""
    return _SPECIAL.fullmatch(token) is not None


def token_shares(row: Row) -> tuple[float, ...]:
    r"""Each token's share ``||D_i||^2 / ||D||_F^2`` of the verified attack's move; empty where there is none.

    The attack looks for the nearest violation, so it moves the tokens through which the goal is easiest to break. It is
    what one attack did, not a bound.

    Args:
        row: A row with an attack.
    """
    squares = [move * move for move in row.token_moves]
    total = sum(squares)
    return tuple(square / total for square in squares) if total > 0 else ()


def heat_line(row: Row) -> HeatLine | None:
    """The tokens of a row with their radii or shares; None where it has neither, or no token strings."""
    if any(row.token_radii) and len(row.token_radii) == len(row.tokens):
        return _by_radius(row)
    shares = token_shares(row)
    if not shares or len(shares) != len(row.tokens):
        return None
    ranked = sorted(range(len(shares)), key=lambda i: -shares[i])[:TOP_TOKENS]
    top, strongest = [i for i in ranked if shares[i] >= TOP_SHARE] or ranked[:1], max(shares)
    tokens = tuple(
        HeatToken(text, share, share / strongest, i in top)
        for i, (text, share) in enumerate(zip(row.tokens, shares, strict=True))
    )
    return HeatLine(row, tokens, tuple(tokens[i] for i in top))


def _by_radius(row: Row) -> HeatLine:
    """The smaller a token's own radius, the stronger it is: the smallest over it, 1 where the token does it alone."""
    radii = [math.inf if radius is None else radius for radius in row.token_radii]
    smallest = min(radii)
    ranked = sorted(range(len(radii)), key=lambda i: radii[i])[:TOP_TOKENS]
    top = [i for i in ranked if math.isfinite(radii[i])]
    tokens = tuple(
        HeatToken(text, 0.0, smallest / radius if radius > 0.0 else 1.0, i in top, row.token_radii[i])
        for i, (text, radius) in enumerate(zip(row.tokens, radii, strict=True))
    )
    return HeatLine(row, tokens, tuple(tokens[i] for i in top), by_radius=True)


def heat_map(rows: Sequence[Row], *, sentences: int) -> tuple[list[HeatSentence], int]:
    """The lines of the most vulnerable inputs.

    Args:
        rows: All rows.
        sentences: Most inputs that are shown.

    Returns:
        The inputs by smallest attack radius, and how many more there are.
    """
    lines: dict[str, list[HeatLine]] = {}
    for row in rows:
        if (line := heat_line(row)) is not None:
            lines.setdefault(row.input_id, []).append(line)
    made = [HeatSentence(name, tuple(sorted(group, key=_radius))) for name, group in lines.items()]
    made.sort(key=lambda sentence: _radius(sentence.lines[0]))
    return made[:sentences], max(0, len(made) - sentences)


def _radius(line: HeatLine) -> float:
    return float("inf") if line.row.attack_radius is None else line.row.attack_radius
