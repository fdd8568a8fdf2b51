"""Options as users write them, read without torch, so that a configuration is checked in a moment.

A name that is listed here is right. Any other asks the registry, which imports what it names: it may be right all the
same, and the registry alone refuses. A test holds the lists equal to the registries.
"""

import re
from pathlib import Path
from typing import Literal

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.text import read_tolerance

DEFAULT_TOLERANCE = "10%"
DEFAULT_ATTACK = "default"
"""The threat's own attack."""

NETWORK_GOALS = ("decision", "hidden", "pooled", "nearest")
"""Goals about a whole model: its own decision, its last hidden states, their mean, the nearest anchor sentence."""
DEFAULT_DEPTH = "embeddings"
LAYER_PLACES = ("normed", "residual", "residual-sum")
"""Where the tokens of an attention layer move: behind or before its block's norm."""

CERTIFICATES = frozenset({
    "castin2024-reported", "castin2024-derived", "spread-lipschitz", "havens2024-local", "singla2020-curvature",
    "kim2021-l2", "cosine-lipschitz", "sigmoid-ball", "dasoulas2021-lipschitznorm", "rigorous-local", "displacement",
    "margin-one-token", "margin-majorant", "conic-margin", "network-lipschitz", "network-product", "network-chain",
    "network-composite", "network-composite-large", "pre-norm-scales", "pre-norm-margin",
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


def require_goal_options(
    *,
    tolerance: str | None,
    readout: object | None,
    pool: str | None,
    label: int | None,
    goal: str | None = None,
    anchors: object | None = None,
    row: int | None = None,
) -> None:
    """Refuse options of a goal that exclude each other or cannot be read; no file is opened.

    Raises:
        InputError: With the cure.
        UnknownNameError: A goal that does not exist.
    """
    if goal is not None:
        _require_network_options(goal, tolerance=tolerance, readout=readout, pool=pool, label=label, row=row)
    elif row is not None:
        raise InputError("a row is one of a whole model's outputs; give --goal decision or hidden, or leave --row out")
    if (anchors is not None) != (goal == "nearest"):
        raise InputError(
            "anchors belong to the goal nearest; give both --goal nearest and --anchors FILE, or neither of them"
        )
    if readout is not None and tolerance is not None:
        raise InputError("a readout and a tolerance exclude each other; give one of --readout and --tolerance")
    if readout is None and label is not None and goal is None:
        raise InputError("a label needs a readout or a decision; give --readout FILE, --goal decision, or no label")
    if pool is not None:
        parse_pool(pool)
    if readout is None:
        read_tolerance(tolerance or DEFAULT_TOLERANCE)


def _require_network_options(
    goal: str, *, tolerance: str | None, readout: object | None, pool: str | None, label: int | None, row: int | None
) -> None:
    if goal not in NETWORK_GOALS:
        raise UnknownNameError("goal", goal, NETWORK_GOALS)
    if readout is not None:
        raise InputError(f"the goal {goal} is about the whole model, a readout about one layer; leave out one of them")
    if pool is not None:
        raise InputError(f"the goal {goal} takes no pool; ask for the goal pooled, or for one token by --row I")
    moves = goal in ("hidden", "pooled")
    if tolerance is not None and not moves:
        raise InputError(f"the goal {goal} has no tolerance, a class stays or changes; leave out --tolerance")
    if label is not None and moves:
        raise InputError(f"the goal {goal} has no classes; leave out --label")
    if row is not None and goal in ("pooled", "nearest"):
        raise InputError(f"the goal {goal} is about the mean of all tokens; leave out --row")


def read_anchors(path: Path) -> tuple[str, ...]:
    """Read anchor sentences, one a line; empty lines are skipped.

    Raises:
        InputError: No such file, not UTF-8, fewer than two sentences, or one that is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the anchors {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); write one anchor a line") from error
    anchors = tuple(" ".join(line.split()) for line in lines if line.strip())
    if len(anchors) < 2:
        count = f"{len(anchors)} anchor sentence{'' if len(anchors) == 1 else 's'}"
        raise InputError(f"{path} holds {count}; write at least two, one a line, one for each class")
    twice = [anchor for anchor in anchors if anchors.count(anchor) > 1]
    if twice:
        raise InputError(f"{path} has the anchor {twice[0][:60]!r} twice; nothing decides between them, take one out")
    return anchors
