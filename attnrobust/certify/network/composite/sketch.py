"""Directions that stand for all: a basis, or Gaussian ones with the factor that their number costs."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import k0e
from torch import Tensor

BISECTIONS = 80  # of the quantile; the side that is kept is the sound one


@dataclass(frozen=True, eq=False)
class Sketch:
    """Directions a_1..a_s with ``sum_basis |B a|^2 <= inflation sum_i |B a_i|^2`` for a fixed matrix B.

    Args:
        directions: The a_i, (s, N); Gaussian ones already divided by sqrt(s).
        inflation: At least 1; exactly 1 for a basis.
        failure: Probability with which the inequality may fail for one B that does not depend on the directions.
    """

    directions: Float[Tensor, "s N"]
    inflation: float
    failure: float


def basis(size: int, device: torch.device) -> Sketch:
    """Every unit vector: an identity, no randomness."""
    return Sketch(torch.eye(size, dtype=torch.float64, device=device), 1.0, 0.0)


def gaussian(size: int, count: int, *, failure: float, seed: int, device: torch.device) -> Sketch:
    """``count`` independent Gaussian directions (lemma 1).

    Args:
        size: N.
        count: s.
        failure: Probability of failure of one use.
        seed: Of the directions; what they are used on must not depend on it.
        device: Where they live.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, size, generator=generator, dtype=torch.float64) / math.sqrt(count)
    return Sketch(directions.to(device), inflation(count, failure), failure)


def deflated(sketch: Sketch, known: Float[Tensor, "k N"]) -> Sketch:
    """Orthonormal directions exactly, and the sketch for what is orthogonal to them (lemma 1a).

    Args:
        sketch: Gaussian directions.
        known: Directions that do not depend on the sketch; the more of the form they see, the less it costs.
    """
    rest = sketch.directions - (sketch.directions @ known.T) @ known
    directions = torch.cat([known, math.sqrt(sketch.inflation) * rest])
    return Sketch(directions, 1.0 + 1e-12, sketch.failure)


def inflation(count: int, failure: float) -> float:
    """``1 / q`` with the largest q < 1 for which ``(q e^{1-q})^{s/2} <= failure``: lemma 1 in its Chernoff form."""
    wanted = 2.0 * math.log(failure) / count
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if math.log(middle) + 1.0 - middle <= wanted:
            low = middle
        else:
            high = middle
    return (1.0 + 1e-12) / low if low > 0.0 else math.inf


@dataclass(frozen=True, eq=False)
class PairSketch:
    """Pairs (a_i, b_i) with ``sum over pairs of a basis |B[a, b]|^2 <= inflation sum_i |B[a_i, b_i]|^2``.

    Args:
        first: The a_i, (s, N), scaled so that the sum needs no mean.
        second: The b_i.
        inflation: At least 1; exactly 1 for all pairs of a basis.
        failure: Probability with which the inequality may fail for one B that does not depend on the pairs.
    """

    first: Float[Tensor, "s N"]
    second: Float[Tensor, "s N"]
    inflation: float
    failure: float


def all_pairs(size: int, device: torch.device) -> PairSketch:
    """Every pair of unit vectors, for a symmetric form: a <= b, those with a < b counted twice. No randomness."""
    unit = torch.eye(size, dtype=torch.float64, device=device)
    one, two = torch.triu_indices(size, size, device=device)
    weight = (1.0 + (one < two).to(unit)).sqrt()[:, None]
    return PairSketch(weight * unit[one], unit[two], 1.0, 0.0)


def gaussian_pairs(size: int, count: int, *, failure: float, seed: int, device: torch.device) -> PairSketch:
    """``count`` independent pairs of independent Gaussian directions (lemma 2); arguments as of ``gaussian``."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, count, size, generator=generator, dtype=torch.float64).to(device)
    return PairSketch(both[0] / math.sqrt(count), both[1], pair_inflation(count, failure), failure)


def pair_inflation(count: int, failure: float) -> float:
    """``1 / q``, ``q = sup_t (log(failure) / s - log E (1 + 2 t h^2)^{-1/2}) / t``: lemma 2; every t is sound.

    The mean over a normal h is ``e^z K_0(z) / (4 pi t)^{1/2}`` with z = 1/(8 t).
    """
    t = np.logspace(-3.0, 8.0, 4000)
    log_mean = np.log(k0e(1.0 / (8.0 * t))) - 0.5 * np.log(4.0 * math.pi * t)
    q = float(np.max((math.log(failure) / count - log_mean) / t)) * (1.0 - 1e-9)
    return 1.0 / q if q > 0.0 else math.inf
