"""Text for people: numbers, and names in the order in which people count."""

import math
import re

MOST_DIGITS = 1e6
"""From here on numbers are shown with an exponent."""


def shown(value: float | None, digits: int = 4) -> str:
    """A number for people: ``digits`` significant digits, a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < MOST_DIGITS else text


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts ``layer.2`` before ``layer.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def shortened(text: str, longest: int) -> str:
    """The text in one line, cut to a length where it is longer."""
    joined = " ".join(text.split())
    return joined if len(joined) <= longest else joined[: longest - 3] + "..."
