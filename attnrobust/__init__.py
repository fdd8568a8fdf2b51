"""Adversarial robustness of attention layers: verified attack radii against sound certified radii, input by input."""

from attnrobust.certify import certify
from attnrobust.errors import (
    AlreadyViolatedError,
    AttnRobustError,
    InputError,
    SoundnessError,
    UnknownNameError,
    UnsupportedModelError,
    UnsupportedThreatError,
)
from attnrobust.goal import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem, TokenMap
from attnrobust.results import (
    AttackResult,
    Certificate,
    CertificationReport,
    Comparison,
    Kind,
    NotApplicable,
    Status,
)
from attnrobust.threat import AnyToken, FrobeniusBall, PerTokenBall, Threat, parse_threat
from attnrobust.tokens import TokenMeasure

__version__ = "0.1.0.dev0"

__all__ = [
    # the question
    "Attention",
    "TokenMap",
    "TokenMeasure",
    "Problem",
    # what may change
    "Threat",
    "FrobeniusBall",
    "PerTokenBall",
    "AnyToken",
    "parse_threat",
    # what must stay true
    "Goal",
    "Displacement",
    "Margin",
    # the answers
    "certify",
    "Certificate",
    "CertificationReport",
    "NotApplicable",
    "AttackResult",
    "Comparison",
    "Kind",
    "Status",
    # what can go wrong
    "AttnRobustError",
    "InputError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UnsupportedThreatError",
    "AlreadyViolatedError",
    "SoundnessError",
    # this release
    "__version__",
]
