"""Adversarial robustness of attention layers: verified attack radii against sound certified radii, input by input.

A name of this package is imported when it is first used, so ``import attnrobust`` costs nothing and loads no torch.
``attnrobust.certify`` is the package of that name, and calling it is calling the function: see ``attnrobust.certify``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ finds the same names
    from attnrobust.attacks import AttackBudget, MassSplitting, attack, attack_many, token_radii
    from attnrobust.certify import certify
    from attnrobust.certify.closed_form.vuckovic2020_measures import (
        MisspecifiedInput,
        general_kernel_constant,
        misspecified_input,
    )
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
    from attnrobust.evaluation import Evaluation, evaluate, read_results
    from attnrobust.goals import Displacement, Goal, Margin
    from attnrobust.layers.attention import Attention
    from attnrobust.layers.spectral import cap_spectral_norms
    from attnrobust.layers.variants.cosine import CosineAttention
    from attnrobust.layers.variants.kernel import KernelAttention
    from attnrobust.layers.variants.l2 import L2Attention
    from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
    from attnrobust.layers.variants.sigmoid import SigmoidAttention
    from attnrobust.lipschitz.contraction import Contraction, contraction
    from attnrobust.lipschitz.fixed_point import FixedPoint, fixed_point
    from attnrobust.lipschitz.invertible import ContractiveResidual
    from attnrobust.lipschitz.regulariser import regulariser
    from attnrobust.lipschitz.search import lipschitz_search
    from attnrobust.lipschitz.table import bounds_table
    from attnrobust.models.anchors import nearest_anchor_readout
    from attnrobust.models.from_file import from_file
    from attnrobust.models.from_torch import from_torch
    from attnrobust.models.from_transformers import from_transformers
    from attnrobust.models.model import load_model
    from attnrobust.models.networks.confirmation import Confirmation
    from attnrobust.models.networks.reading import ReadNetwork
    from attnrobust.models.read_network import read_network
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
    from attnrobust.smoothing.record import SmoothedComparison, Smoothing
    from attnrobust.smoothing.smooth import smooth
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
    "read_network",
    "ReadNetwork",
    "Confirmation",
    "nearest_anchor_readout",
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
    "evaluate",
    "Evaluation",
    "read_results",
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
    "general_kernel_constant",
    "misspecified_input",
    "MisspecifiedInput",
    "contraction",
    "Contraction",
    "fixed_point",
    "FixedPoint",
    "ContractiveResidual",
    "regulariser",
    "cap_spectral_norms",
    "token_radii",
    "smooth",
    "Smoothing",
    "SmoothedComparison",
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

_EXPORTS = {
    "attnrobust.attacks": ("attack", "attack_many", "AttackBudget", "MassSplitting", "token_radii"),
    "attnrobust.certify": ("certify",),
    "attnrobust.certify.closed_form.vuckovic2020_measures": (
        "general_kernel_constant",
        "misspecified_input",
        "MisspecifiedInput",
    ),
    "attnrobust.comparison": ("compare", "UnsoundError"),
    "attnrobust.errors": (
        "AttnRobustError",
        "InputError",
        "UnknownNameError",
        "UnsupportedModelError",
        "UnsupportedThreatError",
        "AlreadyViolatedError",
        "SoundnessError",
    ),
    "attnrobust.evaluation": ("evaluate", "Evaluation", "read_results"),
    "attnrobust.goals": ("Goal", "Displacement", "Margin"),
    "attnrobust.layers.attention": ("Attention",),
    "attnrobust.layers.spectral": ("cap_spectral_norms",),
    "attnrobust.layers.variants.cosine": ("CosineAttention",),
    "attnrobust.layers.variants.kernel": ("KernelAttention",),
    "attnrobust.layers.variants.l2": ("L2Attention",),
    "attnrobust.layers.variants.lipschitznorm": ("LipschitzNormAttention",),
    "attnrobust.layers.variants.sigmoid": ("SigmoidAttention",),
    "attnrobust.lipschitz.contraction": ("contraction", "Contraction"),
    "attnrobust.lipschitz.fixed_point": ("fixed_point", "FixedPoint"),
    "attnrobust.lipschitz.invertible": ("ContractiveResidual",),
    "attnrobust.lipschitz.regulariser": ("regulariser",),
    "attnrobust.lipschitz.search": ("lipschitz_search",),
    "attnrobust.lipschitz.table": ("bounds_table",),
    "attnrobust.models.from_file": ("from_file",),
    "attnrobust.models.from_torch": ("from_torch",),
    "attnrobust.models.from_transformers": ("from_transformers",),
    "attnrobust.models.anchors": ("nearest_anchor_readout",),
    "attnrobust.models.model": ("load_model",),
    "attnrobust.models.networks.confirmation": ("Confirmation",),
    "attnrobust.models.networks.reading": ("ReadNetwork",),
    "attnrobust.models.read_network": ("read_network",),
    "attnrobust.problem": ("TokenMap", "Problem"),
    "attnrobust.results": (
        "Comparison",
        "CertificationReport",
        "Certificate",
        "NotApplicable",
        "Kind",
        "AttackResult",
        "Status",
    ),
    "attnrobust.smoothing.record": ("Smoothing", "SmoothedComparison"),
    "attnrobust.smoothing.smooth": ("smooth",),
    "attnrobust.threats.base": ("Threat",),
    "attnrobust.threats.copies": ("Copies",),
    "attnrobust.threats.measures": ("CouplingBall", "WassersteinBall"),
    "attnrobust.threats.moves": ("MoveThreat", "FrobeniusBall", "PerTokenBall", "AnyToken"),
    "attnrobust.threats.parse": ("parse_threat",),
    "attnrobust.tokens": ("TokenMeasure", "PerturbedTokens"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnrobust' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    # ``certify`` is the callable package in either case: importing it has bound the name, and so it stays.
    value = module if _HOME[name] == f"attnrobust.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
