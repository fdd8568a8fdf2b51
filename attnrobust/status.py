"""How a row ended, and how far a certificate is proved; plain words, so that whoever reads results needs no torch."""

from enum import StrEnum


class Status(StrEnum):
    """How one row ended."""

    FOUND = "found"  # a verified violation (attack), gap known (comparison)
    CERTIFIED = "certified"  # certificates alone; no attack was asked for
    NOT_FOUND = "not_found"  # the attack found no violation within its budget
    MISCLASSIFIED = "misclassified"  # the goal fails at the clean input; both radii are 0
    NAN = "nan"  # the search met NaN or infinity and has nothing verified
    TIMEOUT = "timeout"
    ERROR = "error"
    UNSOUND = "unsound"  # a verified attack inside a certified radius
    DISAGREES = "disagrees"  # a violation of the specification that the user's own model does not show


class Kind(StrEnum):
    """How far a certificate is proved."""

    FLOAT64 = "float64"  # exact-arithmetic proof evaluated in float64
    RIGOROUS = "rigorous"  # outward rounding end to end
    PROBABILISTIC = "probabilistic"  # holds with a stated failure probability
