"""The embedded default: all-MiniLM-L6-v2 with sentences that ship with the package, one layer of it or the whole."""

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

DEMO_MODEL = "minilm"
DEMO_LAYER = "encoder.layer.2.attention"
DEMO_TOLERANCE = "10%"
DECISION_DEPTHS = ("embeddings", "block:5")
"""All six blocks, and the last one."""
DECISION_ATTACK = {"restarts": 4, "steps": 40}


def demo_sentences() -> tuple[str, ...]:
    """The sentences, from short to long.

    Examples:
        >>> len(demo_sentences())
        8
    """
    text = files("attnrobust.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def demo_file() -> AbstractContextManager[Path]:
    """The sentences as a file, one a line, for as long as the context lasts."""
    return as_file(files("attnrobust.demo").joinpath("sentences.txt"))


def anchors_file() -> AbstractContextManager[Path]:
    """One anchor sentence for each class, as a file."""
    return as_file(files("attnrobust.demo").joinpath("anchors.txt"))


def decisions_file() -> AbstractContextManager[Path]:
    """Sentences to classify by the anchors, as a file."""
    return as_file(files("attnrobust.demo").joinpath("decisions.txt"))
