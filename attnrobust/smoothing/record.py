"""How a decision is smoothed, and the record of what is known about the smoothed decision at one input."""

import math
from dataclasses import dataclass

from attnrobust.errors import InputError
from attnrobust.tokens import as_index, as_number

FEWEST = 10
"""Fewest samples: below, no share of successes bounds a probability away from one half."""


@dataclass(frozen=True)
class Smoothing:
    """The smoothed model and how well it is sampled.

    Args:
        sigma: Standard deviation of the noise on every coordinate of every token that may move, > 0; part of the model.
        samples: Noisy decisions that bound the probability of the majority class.
        selection: Noisy decisions, independent of them, that choose that class.
        failure_probability: Of everything that is stated about one input, certificate and attack together.

    Raises:
        InputError: A number out of its range.
    """

    sigma: float
    samples: int = 2000
    selection: int = 100
    failure_probability: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("sigma", "failure_probability"):
            object.__setattr__(self, name, as_number(name, getattr(self, name)))
        for name in ("samples", "selection"):
            object.__setattr__(self, name, as_index(name, getattr(self, name)))
        if not (math.isfinite(self.sigma) and self.sigma > 0.0):
            raise InputError(f"sigma must be a positive number; got {self.sigma}")
        if not 0.0 < self.failure_probability < 0.5:
            raise InputError(f"failure_probability must be between 0 and 0.5; got {self.failure_probability}")
        if self.samples < FEWEST or self.selection < 1:
            raise InputError(f"give at least {FEWEST} samples and 1 of selection; got {self.samples}, {self.selection}")

    @property
    def key(self) -> str:
        """Short readable name for tables."""
        return f"smoothed sigma={self.sigma:g}"


@dataclass(frozen=True)
class SmoothedComparison:
    """The smoothed decision at one input: ``certified_radius <= its robust radius <= attack_radius``.

    Both sides hold together except with ``failure_probability`` over the noise that was drawn.

    Args:
        problem: Digest of the model's own problem, of which this is NOT a certificate.
        smoothing: The smoothed model and its sampling.
        label: The class of the model itself without noise.
        majority: The smoothed decision; None where sampling cannot tell it (abstention).
        share: Share of the samples that gave the majority class.
        probability: Lower bound of the probability of the majority class (Clopper-Pearson).
        certified_radius: Lower bound of the distance at which the smoothed decision changes; 0 on abstention.
        attack_radius: Distance of tokens at which it is another one; infinity where none was found.
        attack_share: Share of the samples that gave the majority class there; NaN where none was found.
        queries: Forward evaluations of single inputs.
        seconds: Wall time.
        seed: Seed of the noise.
    """

    problem: str
    smoothing: Smoothing
    label: int
    majority: int | None
    share: float
    probability: float
    certified_radius: float
    attack_radius: float
    attack_share: float
    queries: int
    seconds: float
    seed: int

    @property
    def abstained(self) -> bool:
        """Whether the smoothed decision could not be told."""
        return self.majority is None

    @property
    def failure_probability(self) -> float:
        """Probability with which any statement of this record may be false."""
        return self.smoothing.failure_probability

    @property
    def gap(self) -> float:
        """``attack_radius / certified_radius``; infinity where a side is missing."""
        return self.attack_radius / self.certified_radius if self.certified_radius > 0.0 else math.inf
