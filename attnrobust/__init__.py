"""Adversarial robustness of attention layers: verified attack radii against sound certified radii, input by input.

The names ``attack``, ``certify``, ``compare`` and ``bounds_table`` of this package are the functions; the modules that
hold them are reached by ``from attnrobust.certify import ...`` and so on.
"""

from attnrobust.attacks import AttackBudget, MassSplitting, attack, attack_many, token_radii
from attnrobust.certify import certify
from attnrobust.comparison import UnsoundError, compare
from attnrobust.errors import (
    AlreadyViolatedError,
    AttnRobustError,
    InputError,
    SoundnessError,
    UnknownNameError,
    UnsupportedModelError,
    UnsupportedThreatError,
)
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.contraction import Contraction, contraction
from attnrobust.lipschitz.fixed_point import FixedPoint, fixed_point
from attnrobust.lipschitz.invertible import ContractiveResidual
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.lipschitz.table import bounds_table
from attnrobust.models.from_file import from_file
from attnrobust.models.from_torch import from_torch
from attnrobust.models.from_transformers import from_transformers
from attnrobust.models.model import load_model
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
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import PerturbedTokens, TokenMeasure

__version__ = "0.1.0.dev0"

__all__ = [
    # the question
    "Attention",
    "TokenMap",
    "TokenMeasure",
    "PerturbedTokens",
    "Problem",
    "from_torch",
    "from_transformers",
    "from_file",
    "load_model",
    "L2Attention",
    "CosineAttention",
    "SigmoidAttention",
    "LipschitzNormAttention",
    "KernelAttention",
    # what may change
    "Threat",
    "MoveThreat",
    "FrobeniusBall",
    "PerTokenBall",
    "AnyToken",
    "parse_threat",
    "CouplingBall",
    "WassersteinBall",
    "Copies",
    # what must stay true
    "Goal",
    "Displacement",
    "Margin",
    # the answers
    "compare",
    "Comparison",
    "certify",
    "CertificationReport",
    "Certificate",
    "NotApplicable",
    "Kind",
    "attack",
    "attack_many",
    "AttackBudget",
    "MassSplitting",
    "AttackResult",
    "Status",
    # more questions
    "bounds_table",
    "lipschitz_search",
    "contraction",
    "Contraction",
    "fixed_point",
    "FixedPoint",
    "ContractiveResidual",
    "token_radii",
    # what can go wrong
    "AttnRobustError",
    "InputError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UnsupportedThreatError",
    "AlreadyViolatedError",
    "SoundnessError",
    "UnsoundError",
    # this release
    "__version__",
]
