"""A text that every Python has: the topics of its built-in help."""

import hashlib
import re
from functools import cache

PROSE = ("objects", "execmodel", "import", "customization", "naming", "types", "compound", "specialnames")


@cache
def library_text() -> str:
    """Help topics of Python's standard library in order of name, about 450,000 characters of English about a language.

    Other versions of Python have another text; ``digest`` tells them apart.
    """
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def prose() -> list[str]:
    """The topics that are mostly sentences, as running words; each has more than 700."""
    from pydoc_data.topics import topics

    return [" ".join(re.sub(r"[*=~^`-]{2,}", " ", str(topics[name])).split()) for name in PROSE]


def digest(text: str) -> str:
    """SHA-256 of a text, its first 16 digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
