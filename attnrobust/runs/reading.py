"""Options as users write them, read without torch, so that a configuration is checked in a moment.

A name that is listed here is right. Any other asks the registry, which imports what it names: it may be right all the
same, and the registry alone refuses. A test holds the lists equal to the registries.
"""

import re
from typing import Literal

from attnrobust.errors import InputError
from attnrobust.text import read_tolerance

DEFAULT_TOLERANCE = "10%"
DEFAULT_ATTACK = "default"
"""The threat's own attack."""

CERTIFICATES = frozenset({
    "castin2024-reported", "castin2024-derived", "spread-lipschitz", "havens2024-local", "singla2020-curvature",
    "kim2021-l2", "cosine-lipschitz", "sigmoid-ball", "dasoulas2021-lipschitznorm", "rigorous-local", "displacement",
    "margin-one-token", "margin-majorant", "conic-margin",
})  # fmt: skip
"""Those that speak about moved tokens."""
ATTACKS = frozenset({DEFAULT_ATTACK, "token-moving"})
"""Those that search threats on moved tokens."""

_MOVES = re.compile(
    r"(frobenius|per-token|per-token-linf|per-token-l1|any-token)(:\d+(,\d+)*)?|token:\d+|tokens:\d+(,\d+)*"
)


def is_known_move(threat: str) -> bool:
    """Whether the text is a threat on moved tokens, spelt right; False leaves it open."""
    return _MOVES.fullmatch(threat) is not None


def parse_pool(text: str) -> Literal["all", "mean"] | int:
    """Read ``all``, ``mean`` or ``row:I``.

    Raises:
        InputError: Anything else.
    """
    if text == "all":
        return "all"
    if text == "mean":
        return "mean"
    if re.fullmatch(r"row:\d+", text):
        return int(text.removeprefix("row:"))
    raise InputError(f"pool {text!r}: give all, mean or row:I, as in row:0")


def require_goal_options(*, tolerance: str | None, readout: object | None, pool: str | None, label: int | None) -> None:
    """Refuse options of a goal that exclude each other or cannot be read; a readout's file is not opened.

    Raises:
        InputError: With the cure.
    """
    if readout is not None and tolerance is not None:
        raise InputError("a readout and a tolerance exclude each other; give one of --readout and --tolerance")
    if readout is None and label is not None:
        raise InputError("a label needs a readout; give --readout FILE or leave --label out")
    if pool is not None:
        parse_pool(pool)
    if readout is None:
        read_tolerance(tolerance or DEFAULT_TOLERANCE)
