"""Text for people: numbers, and names in the order in which people count."""

import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from attnrobust.errors import InputError

MOST_DIGITS = 1e6
"""From here on numbers are shown with an exponent."""


def shown(value: float | None, digits: int = 4) -> str:
    """A number for people: ``digits`` significant digits, a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < MOST_DIGITS else text


def shown_bound(value: float | None, *, up: bool, digits: int = 4) -> str:
    """A bound for people, rounded so that it stays true: upper bounds (attack radii) up, certified radii down."""
    if value is None or not math.isfinite(value) or float(f"{value:.{digits}g}") == value:
        return shown(value, digits)
    return shown(rounded(value, up=up, digits=digits), digits)


def rounded(value: float, *, up: bool, digits: int) -> float:
    """The nearest number of so many significant digits that is not below (``up``) or not above the value."""
    context = Context(prec=digits, rounding=ROUND_CEILING if up else ROUND_FLOOR)
    return float(context.create_decimal(Decimal(value)))


def exactly(value: float) -> str:
    """A number that a user gave, with every digit it needs: ``0.123456``, ``3``."""
    return repr(float(value)).removesuffix(".0")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts ``layer.2`` before ``layer.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def shortened(text: str, longest: int) -> str:
    """The text in one line, cut to a length where it is longer."""
    joined = " ".join(text.split())
    return joined if len(joined) <= longest else joined[: longest - 3] + "..."


_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


def read_tolerance(text: str) -> tuple[float, bool]:
    """Read an allowed displacement: its value, and whether it is a share of the clean output's norm.

    Raises:
        InputError: Not a positive number, with or without a percent sign.
    """
    match = re.fullmatch(rf"({_NUMBER})\s*(%?)", text.strip())
    if match is None:
        raise InputError(f"tolerance {text!r}: give a share of the output's norm such as 1%, or a positive number")
    value = float(match[1]) / 100 if match[4] else float(match[1])
    if not 0.0 < value < float("inf"):
        raise InputError(f"tolerance must be a positive number; got {text}")
    return value, bool(match[4])
