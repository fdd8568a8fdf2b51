"""The text of a VNN-LIB file: a box of inputs, and the output constraints of which a solution breaks the goal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from attnrobust.interchange.box import Box, Precision

Version = Literal["1.0", "2.0"]
"""1.0: flat variables X_i and Y_j, as in the verification competitions up to 2025; 2.0: typed tensors X and Y."""


VERSIONS: tuple[Version, ...] = get_args(Version)


@dataclass(frozen=True)
class Names:
    """How entries of the input and the output are written.

    Args:
        version: Of the standard.
        width: Entries of one token.
    """

    version: Version
    width: int

    def x(self, place: int) -> str:
        """An entry of the input, by its place in row-major order."""
        token, entry = divmod(place, self.width)
        return f"X_{place}" if self.version == "1.0" else f"X[0,{token},{entry}]"

    def y(self, index: int) -> str:
        """A logit."""
        return f"Y_{index}" if self.version == "1.0" else f"Y[0,{index}]"


def vnnlib_text(
    box: Box, *, label: int, rivals: Iterable[int], classes: int, precision: Precision, version: Version,
    comments: Iterable[str],
) -> str:  # fmt: skip
    """The question "is there a point of the box at which a rival's logit is at least that of the label?".

    Args:
        box: Bounds of the input (1, n, d).
        label: The class that must stay.
        rivals: The classes that may not reach it; the logits are (1, classes).
        classes: Number of logits.
        precision: Type of the variables (version 2.0).
        version: Of the standard.
        comments: Lines before everything.

    Returns:
        The file; every number is the bound itself, in decimals without an exponent.
    """
    n, width = box.lower.shape
    names = Names(version, int(width))
    lines = [f"; {comment}" for comment in comments]
    lines += _declared(int(n), int(width), classes, precision, names)
    lines += _inputs(box, names)
    lines.append(_violation(label, list(rivals), names))
    return "\n".join(lines) + "\n"


def decimal(value: float) -> str:
    """All decimals of a binary number: however a reader rounds, a number of the file's precision stays itself."""
    text = format(Decimal(value + 0.0), "f")  # -0.0 + 0.0 is 0.0
    return text if "." in text else f"{text}.0"


def _declared(n: int, width: int, classes: int, precision: Precision, names: Names) -> Iterator[str]:
    if names.version == "1.0":
        yield from (f"(declare-const {names.x(i)} Real)" for i in range(n * width))
        yield from (f"(declare-const {names.y(j)} Real)" for j in range(classes))
        return
    yield "(vnnlib-version <2.0>)"
    yield "(declare-network network"
    yield f"  (declare-input X {precision} [1,{n},{width}])"
    yield f"  (declare-output Y {precision} [1,{classes}])"
    yield ")"


def _inputs(box: Box, names: Names) -> Iterator[str]:
    pairs = zip(box.lower.flatten().tolist(), box.upper.flatten().tolist(), strict=True)
    for place, (lower, upper) in enumerate(pairs):
        yield f"(assert (>= {names.x(place)} {decimal(lower)}))"
        yield f"(assert (<= {names.x(place)} {decimal(upper)}))"


def _violation(label: int, rivals: list[int], names: Names) -> str:
    """A margin must stay positive, so it is broken where a rival's logit is equal or larger."""
    broken = [f"(>= {names.y(rival)} {names.y(label)})" for rival in rivals]
    if len(broken) == 1:
        return f"(assert {broken[0]})"
    return "(assert (or " + " ".join(f"(and {one})" for one in broken) + "))"
