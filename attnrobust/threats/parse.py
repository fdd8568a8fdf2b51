"""Threats from their keys: what the command line, run configurations and tables call them."""

import math
import re

from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.numerics.transport import Order
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import CausalOrder, Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall, TokenNorm

NORMS: dict[str, TokenNorm] = {"per-token": "l2", "per-token-linf": "linf", "per-token-l1": "l1"}
BALLS: dict[str, type[CouplingBall] | type[WassersteinBall]] = {
    "coupling": CouplingBall,
    "wasserstein": WassersteinBall,
}
ORDERS: dict[str, Order] = {"1": 1, "2": 2, "inf": math.inf}
MOVES = ("frobenius", *NORMS, "any-token", "token", "tokens")
KEYS = (
    *(name for name in MOVES if not name.startswith("token")),
    "token:I",
    "tokens:I,J",
    *(f"{ball}:{order}" for ball in BALLS for order in ORDERS),
    "copies:R",
)
"""How keys begin; the parser's docstring has the rest."""


def parse_threat(text: str) -> Threat:
    """Read a threat from its key.

    Moved tokens: ``frobenius``, ``per-token``, ``per-token-linf``, ``per-token-l1``, ``any-token``, ``token:I``,
    ``tokens:I,J,...``; every name takes ``:I,J,...``, the tokens that may move. Measures: ``coupling:P`` and
    ``wasserstein:P`` with P one of 1, 2, inf, then ``:within:R`` (the largest norm of a token) and ``:tokens:I,J``.
    Copies: ``copies:R`` or ``copies:R:strict``, then the key of the moves: ``copies:2:per-token``,
    ``copies:1:tokens:0,3``.

    Raises:
        UnknownNameError: With the nearest names.
        InputError: Numbers that cannot be read, or that the threat does not take.
    """
    name, _, rest = text.partition(":")
    if name in BALLS:
        return _ball(text, name, rest)
    if name == "copies":
        return _copies(text, rest)
    return _moves(text)


def parse_move_threat(text: str) -> MoveThreat:
    """Read a threat on moved tokens from its key, where no other makes sense.

    Raises:
        UnknownNameError: With the nearest names.
        UnsupportedThreatError: A threat on measures or copies.
    """
    threat = parse_threat(text)
    if not isinstance(threat, MoveThreat):
        raise UnsupportedThreatError(f"threat {text!r} does more than move tokens; use frobenius, per-token, any-token")
    return threat


def _moves(text: str, whole: str | None = None) -> MoveThreat:
    name, separator, rest = text.partition(":")
    if name not in MOVES:
        raise UnknownNameError("threat", whole or text, KEYS if whole is None else MOVES)
    tokens: tuple[int, ...] | None = None
    if separator or name in ("token", "tokens"):
        if name == "token" and "," in rest:
            raise _unreadable_tokens(text)
        tokens = _tokens(text, rest)
    if name == "any-token":
        return AnyToken(tokens=tokens)
    return PerTokenBall(norm=NORMS[name], tokens=tokens) if name in NORMS else FrobeniusBall(tokens=tokens)


def _ball(text: str, name: str, rest: str) -> CouplingBall | WassersteinBall:
    match = re.fullmatch(r"(?P<order>[^:]*)(:within:(?P<radius>[^:]*))?(:tokens:(?P<tokens>[^:]*))?", rest)
    if match is None or match["order"] not in ORDERS:
        raise UnknownNameError("threat", text, [f"{ball}:{order}" for ball in BALLS for order in ORDERS])
    tokens = None if match["tokens"] is None else _tokens(text, match["tokens"])
    try:
        radius = None if match["radius"] is None else float(match["radius"])
        return BALLS[name](ORDERS[match["order"]], domain_radius=radius, tokens=tokens)
    except ValueError as error:
        raise InputError(f"threat {text!r}: give the largest norm of a token, as in {name}:2:within:3.5") from error


def _copies(text: str, rest: str) -> Copies:
    number, _, rest = rest.partition(":")
    if not number.isdecimal():
        raise InputError(f"threat {text!r}: give the largest number of extra copies, as in copies:2")
    word, _, moves = rest.partition(":")
    order: CausalOrder = "strict" if word == "strict" else "tied"
    if word not in ("tied", "strict"):
        moves = rest
    if not moves:
        return Copies(int(number), order)
    if moves.partition(":")[0] not in MOVES:
        raise UnknownNameError("order or moves of copies", moves, ("tied", "strict", *MOVES))
    return Copies(int(number), order, _moves(moves))


def _tokens(text: str, listed: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", listed):
        raise _unreadable_tokens(text)
    return tuple(int(part) for part in listed.split(","))


def _unreadable_tokens(text: str) -> InputError:
    return InputError(f"threat {text!r}: give token indices, as in token:3 or tokens:1,4")
