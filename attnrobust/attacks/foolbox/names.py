"""Which foolbox attacks can search here, which are refused and why; a table, read without importing foolbox."""

import math
from dataclasses import dataclass
from enum import StrEnum

from attnrobust.errors import InputError, UnknownNameError

PREFIX = "foolbox:"
"""Attack names that begin so are looked up in the table of this module."""


class Options(StrEnum):
    """How the budget of an input becomes the options of a foolbox attack."""

    DESCENT = "descent"  # steps; a step is 2.5 / steps of the ball's radius
    ADAM = "adam"  # the same, but a step is made by every entry: divided by the norm of the all-ones vector
    ONE_STEP = "one-step"  # none
    STEPS = "steps"  # steps; the lengths are in units of the first-order radius
    BOXED = "boxed"  # steps and a step length; entries stay in a finite box
    NOISE = "noise"  # repeats


@dataclass(frozen=True, kw_only=True)
class FoolboxEntry:
    """One attack class of foolbox 3.3.

    Args:
        name: Its name here, after ``foolbox:``.
        attack: The class in ``foolbox.attacks``.
        norm: Order p of the norm that it measures: 1, 2, infinity (0 occurs among the refused only).
        fixed: Whether it searches at a fixed size; otherwise it looks for the smallest perturbation.
        options: How steps and step lengths are set; None where it is refused.
        box: Largest change of an entry in units of the first-order radius, or None where no box is needed.
        reason: Why it is refused; empty where it is supported.
        cure: What to use in its place; empty where it is supported.
        aliases: Other names that are understood.
    """

    name: str
    attack: str
    norm: float
    fixed: bool
    options: Options | None = None
    box: float | None = None
    reason: str = ""
    cure: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def supported(self) -> bool:
        """Whether it can be used as an attack here."""
        return self.options is not None


L1, L2, LINF = 1.0, 2.0, math.inf
BOX = 4.0
"""Half width of the box of attacks that need one, in units of the first-order radius in the attack's own norm."""
WHOLE_NAMES = ((L1, "L1"), (L2, "L2"), (LINF, "Linf"))


def _family(suffix: str, options: Options, short: str | None = None) -> tuple[FoolboxEntry, ...]:
    """The three norms of one fixed-size attack."""
    return tuple(
        FoolboxEntry(
            name=f"{norm}{short}" if short else f"{norm}{suffix.removesuffix('Attack')}",
            attack=f"{norm}{suffix}", norm=p, fixed=True, options=options,
            aliases=(f"{norm}{suffix}",),
        )
        for p, norm in WHOLE_NAMES
    )  # fmt: skip


def _noise(name: str, norm: float) -> FoolboxEntry:
    return FoolboxEntry(
        name=name, attack=f"{name}Attack", norm=norm, fixed=True, options=Options.NOISE, aliases=(f"{name}Attack",)
    )


def _smallest(attack: str, norm: float, options: Options, *, box: float | None = None) -> FoolboxEntry:
    return FoolboxEntry(
        name=attack.removesuffix("Attack"), attack=attack, norm=norm, fixed=False, options=options, box=box,
        aliases=(attack,),
    )  # fmt: skip


def _refused(attack: str, norm: float, reason: str, cure: str, *, fixed: bool = False) -> FoolboxEntry:
    return FoolboxEntry(
        name=attack.removesuffix("Attack"), attack=attack, norm=norm, fixed=fixed, reason=reason, cure=cure,
        aliases=(attack,),
    )  # fmt: skip


GRADIENT_CURE = "use token-moving, foolbox:DDN or foolbox:L2PGD"
IMAGE = "it changes contrast, blur, place or pixel values of images; tokens have neither"
NUMBA = "it compiles with numba, which foolbox does not install, and takes a minute per process and norm"
PIXELS = "its steps assume pixel values in [0, 1]"
DECISION_CURE = "use token-moving, which sees the gradients"

_RAW: tuple[FoolboxEntry, ...] = (
    *_family("ProjectedGradientDescentAttack", Options.DESCENT, "PGD"),
    *_family("AdamProjectedGradientDescentAttack", Options.ADAM, "AdamPGD"),
    *_family("BasicIterativeAttack", Options.DESCENT),
    *_family("AdamBasicIterativeAttack", Options.ADAM),
    *_family("MomentumIterativeFastGradientMethod", Options.DESCENT),
    *_family("FastGradientAttack", Options.ONE_STEP),
    FoolboxEntry(
        name="SparseL1Descent", attack="SparseL1DescentAttack", norm=L1, fixed=True, options=Options.DESCENT,
        aliases=("SparseL1DescentAttack",),
    ),
    _noise("L2AdditiveGaussianNoise", L2),
    _noise("L2AdditiveUniformNoise", L2),
    _noise("LinfAdditiveUniformNoise", LINF),
    _noise("L2RepeatedAdditiveGaussianNoise", L2),
    _noise("L2RepeatedAdditiveUniformNoise", L2),
    _noise("LinfRepeatedAdditiveUniformNoise", LINF),
    _smallest("DDNAttack", L2, Options.STEPS),
    _smallest("L1FMNAttack", L1, Options.STEPS),
    _smallest("LInfFMNAttack", LINF, Options.STEPS),
    _smallest("L2DeepFoolAttack", L2, Options.STEPS),
    _smallest("LinfDeepFoolAttack", LINF, Options.STEPS),
    _smallest("L2CarliniWagnerAttack", L2, Options.BOXED, box=BOX),
    _smallest("EADAttack", L1, Options.BOXED, box=BOX),
    # ---- refused ---------------------------------------------------------------------------------------------------
    _refused("L2FMNAttack", L2, "its projection divides a norm by itself and never projects", "use foolbox:DDN"),
    _refused("L0FMNAttack", 0.0, "it counts changed entries, which no threat here measures", "use foolbox:L1FMN"),
    _refused("L0BrendelBethgeAttack", 0.0, "it counts changed entries; " + NUMBA, "use foolbox:L1FMN"),
    _refused("L1BrendelBethgeAttack", L1, NUMBA, "use foolbox:L1FMN or foolbox:EAD"),
    _refused("L2BrendelBethgeAttack", L2, NUMBA, "use foolbox:DDN or foolbox:L2CarliniWagner"),
    _refused("LinfinityBrendelBethgeAttack", LINF, NUMBA, "use foolbox:LInfFMN"),
    _refused("HopSkipJumpAttack", L2, "it clips to [0, 1] whatever the bounds are and then never ends", DECISION_CURE),
    _refused("BoundaryAttack", L2, "one input without a start makes it give up on all of them", DECISION_CURE),
    _refused("PointwiseAttack", L2, "it fails at every finite size", DECISION_CURE),
    _refused("DatasetAttack", L2, "it needs a data set of other inputs", DECISION_CURE),
    _refused("GenAttack", LINF, "it is targeted only and clamps to [0, 1]", "use foolbox:LinfPGD", fixed=True),
    _refused("NewtonFoolAttack", L2, "it divides by the class probability and returns NaN", "use foolbox:L2DeepFool"),
    _refused(
        "VirtualAdversarialAttack", L2, "it returns NaN where the outputs agree, as near the clean input",
        "use foolbox:L2PGD", fixed=True,
    ),
    *(
        _refused(f"L2ClippingAware{kind}NoiseAttack", L2, "it needs the bounds of pixels", f"use foolbox:L2{kind}Noise",
                 fixed=True)
        for kind in ("AdditiveGaussian", "AdditiveUniform", "RepeatedAdditiveGaussian", "RepeatedAdditiveUniform")
    ),
    *(
        _refused(name, L2, IMAGE, GRADIENT_CURE)
        for name in (
            "BinarySearchContrastReductionAttack", "LinearSearchContrastReductionAttack", "InversionAttack",
            "GaussianBlurAttack", "SpatialAttack", "BinarizationRefinementAttack",
        )
    ),
    _refused("L2ContrastReductionAttack", L2, IMAGE, GRADIENT_CURE, fixed=True),
    _refused("SaltAndPepperNoiseAttack", 0.0, PIXELS, "use foolbox:L2RepeatedAdditiveGaussianNoise"),
    _refused("LinearSearchBlendedUniformNoiseAttack", L2, PIXELS, "use foolbox:L2RepeatedAdditiveGaussianNoise"),
)  # fmt: skip

SHORT_NAMES = (
    ("FGM", "L2FastGradient"), ("FGSM", "LinfFastGradient"), ("PGD", "LinfPGD"), ("AdamPGD", "LinfAdamPGD"),
    ("MIFGSM", "LinfMomentumIterativeFastGradientMethod"), ("LinfFMN", "LInfFMN"),
)  # fmt: skip
"""foolbox's own abbreviations and the names here that they stand for."""

FOOLBOX_ATTACKS: tuple[FoolboxEntry, ...] = _RAW
"""Every attack class of ``foolbox.attacks``, supported or refused."""


def foolbox_entry(name: str) -> FoolboxEntry:
    """Look a supported foolbox attack up by its name, ``foolbox:`` included.

    Raises:
        UnknownNameError: A name that foolbox does not have; lists the nearest supported ones.
        InputError: A refused attack; says why and what to use instead.
    """
    short = name.removeprefix(PREFIX)
    short = dict(SHORT_NAMES).get(short, short)
    for entry in FOOLBOX_ATTACKS:
        if short in (entry.name, *entry.aliases):
            if entry.supported:
                return entry
            raise InputError(f"attack {name!r} is refused: {entry.reason}; {entry.cure}")
    raise UnknownNameError("attack", name, foolbox_names())


def foolbox_names() -> tuple[str, ...]:
    """The names of the supported foolbox attacks."""
    return tuple(PREFIX + entry.name for entry in FOOLBOX_ATTACKS if entry.supported)
