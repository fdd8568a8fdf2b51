"""The embedded default: eight sentences that ship with the package, for one layer of all-MiniLM-L6-v2."""

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

DEMO_MODEL = "minilm"
DEMO_LAYER = "encoder.layer.2.attention"
DEMO_TOLERANCE = "10%"


def demo_sentences() -> tuple[str, ...]:
    """The sentences, from short to long.

    Example:
        >>> len(demo_sentences())
        8
    """
    text = files("attnrobust.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def demo_file() -> AbstractContextManager[Path]:
    """The sentences as a file, one a line, for as long as the context lasts."""
    return as_file(files("attnrobust.demo").joinpath("sentences.txt"))
