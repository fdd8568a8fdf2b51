"""Boxes inside and around the sets of threats on moved tokens, with bounds that are numbers of the file's precision."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.numerics.rounding import UNIT, inward
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import as_positive

Name = TypeVar("Name")

Side = Literal["inscribed", "enclosing"]
"""Where a box lies: inside of the threat's set, or around it."""

Precision = Literal["float32", "float64"]
"""Of the exported network and of its inputs."""

SIDES: tuple[Side, ...] = get_args(Side)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}

TWO_BOXES = (
    "VNN-LIB states linear constraints: export the largest box inside (box inscribed), of which 'sat' is a violation "
    "within the radius, or the smallest box around (box enclosing), of which 'unsat' is a certificate"
)


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of every entry of the tokens.

    Args:
        lower: Smallest allowed values (n, d), float64, each a number of the file's precision.
        upper: Largest allowed values.
        side: On which side of the threat's set the box lies, the rounding of its bounds included.
        half_width: Allowed move of one entry of a token that may move, before that rounding.
        exact: Whether the threat's set itself is a box, so that this one differs from it by that rounding only.
    """

    lower: Float[Tensor, "n d"]
    upper: Float[Tensor, "n d"]
    side: Side
    half_width: float
    exact: bool

    @property
    def place(self) -> str:
        """Where it lies, in words."""
        if self.exact:
            return f"is the threat's set, its bounds rounded {'inward' if self.side == 'inscribed' else 'outward'}"
        return "lies in the threat's set" if self.side == "inscribed" else "holds the threat's set"

    @property
    def sat(self) -> str:
        """What the answer "sat" says about the threat's set."""
        if self.side == "inscribed":
            return "the point is a move within the radius that breaks the goal of the exported network"
        beyond = "by the rounding of the bounds alone" if self.exact else "and then says nothing about it"
        return f"some move within the box breaks it; the point may lie outside of the threat's set, {beyond}"

    @property
    def unsat(self) -> str:
        """What the answer "unsat" says about the threat's set."""
        if self.side == "enclosing":
            return "no move within the radius breaks the goal of the exported network"
        beyond = "the rounding of the bounds" if self.exact else "the rest of the threat's set"
        return f"no move within the box breaks it; {beyond} is not covered"


def box_of(
    threat: Threat, clean: Float[Tensor, "n d"], epsilon: float, *, side: Side | None, precision: Precision
) -> Box:
    """The box of a threat's set of one radius around clean tokens.

    With m tokens that may move and width d, the largest box inside of the ball of radius r has the half-width
    ``r / sqrt(m d)`` (frobenius), ``r / sqrt(d)`` (per-token), ``r / d`` (per-token-l1) or r (per-token-linf, itself a
    box); the smallest one around has r. Bounds are rounded inward or outward, to numbers of the file's precision.

    Args:
        threat: What may change.
        clean: The clean tokens.
        epsilon: The radius, > 0.
        side: None only where the threat's set is a box; then its bounds are rounded outward.
        precision: Of the file.

    Raises:
        UnsupportedThreatError: A threat without such a box, or one that is none while no side is named.
        InputError: No number of the file's precision between the bounds of an entry, or bounds beyond its range.
    """
    named("box", side, (None, *SIDES))
    named("precision", precision, PRECISIONS)
    radius, movable = as_positive("epsilon", epsilon), threat.movable(int(clean.shape[0])).to(clean.device)
    inside, exact = _inside(threat, int(movable.sum()), int(clean.shape[1]))
    if side is None and not exact:
        raise UnsupportedThreatError(f"the set of the threat {threat.key} is no box; {TWO_BOXES}")
    if side == "inscribed" and inside == 0.0:
        raise UnsupportedThreatError(
            f"no box around the clean tokens lies within {threat.key}, where only one token moves; "
            "name it by the threat token:I, or take the box enclosing"
        )
    chosen: Side = side or "enclosing"
    half = radius if exact or chosen == "enclosing" else inward(radius * inside, UNIT)
    lower, upper = _bounds(clean, half * movable.to(clean)[:, None], chosen, DTYPES[precision])
    _require_numbers(lower, upper, half, precision)
    return Box(lower, upper, chosen, half, exact)


def named(kind: str, name: object, known: Sequence[Name]) -> Name:
    """One of a few names.

    Raises:
        UnknownNameError: Another one.
    """
    for one in known:
        if name == one:
            return one
    raise UnknownNameError(kind, str(name), [str(one) for one in known if one is not None])


def _inside(threat: Threat, tokens: int, width: int) -> tuple[float, bool]:
    """Half-width of the largest box inside of the set of radius 1 (0: none), and whether the set is that box."""
    if type(threat) is FrobeniusBall:
        return 1.0 / math.sqrt(tokens * width), False
    if type(threat) is PerTokenBall:
        shares = {"l2": 1.0 / math.sqrt(width), "l1": 1.0 / width, "linf": 1.0}
        return shares[threat.norm], threat.norm == "linf"
    if type(threat) is AnyToken:
        return 0.0, False
    raise UnsupportedThreatError(
        f"the threat {threat.key} does more than move tokens, which no bounds on their entries say; "
        "ask about per-token-linf, or frobenius with a box"
    )


def _bounds(clean: Tensor, half: Tensor, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``clean -+ half`` as numbers of a precision, each rounded away from the clean tokens or towards them."""
    lower, below = _sum(clean, -half)
    upper, above = _sum(clean, half)
    out = side == "enclosing"
    return _rounded(lower, below, down=out, dtype=dtype), _rounded(upper, above, down=not out, dtype=dtype)


def _sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and what rounding took from it (Knuth's two-sum; exact without overflow)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _rounded(value: Tensor, rest: Tensor, *, down: bool, dtype: torch.dtype) -> Tensor:
    """``value + rest`` rounded down or up to a precision; returned as float64."""
    towards = torch.full_like(value, -math.inf if down else math.inf)
    crossed = rest < 0 if down else rest > 0
    value = torch.where(crossed, torch.nextafter(value, towards), value)
    found = value.to(dtype)
    beyond = found.double() > value if down else found.double() < value
    return torch.where(beyond, torch.nextafter(found, towards.to(dtype)), found).double()


def _require_numbers(lower: Tensor, upper: Tensor, half: float, precision: Precision) -> None:
    largest = torch.finfo(DTYPES[precision]).max
    if not bool(((lower.abs() <= largest) & (upper.abs() <= largest)).all()):
        raise InputError(f"bounds of the box are beyond the range of {precision}; take a smaller radius")
    empty = (lower > upper).nonzero()
    if len(empty):
        token, entry = empty[0].tolist()
        raise InputError(
            f"no {precision} number lies within the inscribed box at token {token}, entry {entry} (half-width "
            f"{half:.3g}, and tokens that do not move have one value); take the precision float64 or the box enclosing"
        )
