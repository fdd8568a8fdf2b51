"""The smoothed decision at one input, certified and attacked with one failure probability."""

import math
import time
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from attnrobust.attacks import attack as attack_model
from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.goals import Margin
from attnrobust.numerics.chance import stream
from attnrobust.problem import Problem, require_problem
from attnrobust.smoothing.record import SmoothedComparison, Smoothing
from attnrobust.smoothing.search import nearest_flip
from attnrobust.smoothing.votes import Voters, probability_above, probability_below
from attnrobust.threats.moves import MoveThreat

SAFE = 1.0 - 1e-9
"""Covers what quantiles of the normal and the beta distribution round (libraries give about 1e-12)."""
TRIES = 9
STRETCH = 0.01
"""A flip of half of the votes proves nothing: the move is stretched by 0, 1, 3, 7, ... % until fresh votes prove a
change of the majority."""


def smooth(problem: Problem, smoothing: Smoothing | float, *, seed: int = 0, attack: bool = True) -> SmoothedComparison:
    """Certify and attack the majority decision under Gaussian noise on the tokens, a model of its own.

    The smoothed decision at tokens X is the class that the network decides most often at ``X + sigma N``, N standard
    normal on the tokens that the threat may move. If the majority class has probability p > 1/2 at the clean tokens, it
    stays the majority within ``sigma Phi^-1(p)`` in Frobenius norm; a threat whose set of size r lies in the Frobenius
    ball of size ``c r`` gets that radius over c.

    Args:
        problem: A margin (a decision) on moved tokens; the problem of the model itself.
        smoothing: Noise and sampling; a number is sigma.
        seed: Seed of the noise.
        attack: Whether to look for a change of the smoothed decision, too.

    Returns:
        Both radii of the SMOOTHED decision, with one failure probability for everything together: half of it is spent
        on the certificate, half on the verification of the attack.

    Raises:
        InputError: No problem, or a displacement goal, of which there is no decision.
        UnsupportedThreatError: A threat that does more than move tokens.

    References:
        Cohen, Rosenfeld, Kolter 2019, Theorem 1 and Proposition 2 (with p_B <= 1 - p_A); Clopper, Pearson 1934.
    """
    start = time.perf_counter()
    require_problem(problem)
    smoothing = smoothing if isinstance(smoothing, Smoothing) else Smoothing(smoothing)
    _refuse(problem)
    voters = Voters(problem, smoothing.sigma)
    certified = _certified(voters, smoothing, seed)
    flip = _Flip() if certified.majority is None or not attack else _attacked(voters, smoothing, certified, seed)
    return SmoothedComparison(
        problem=problem.digest,
        smoothing=smoothing,
        label=voters.classes[0],
        majority=None if certified.majority is None else voters.classes[certified.majority],
        share=certified.share,
        probability=certified.probability,
        certified_radius=certified.radius,
        attack_radius=flip.radius,
        attack_share=flip.share,
        queries=voters.queries,
        seconds=time.perf_counter() - start,
        seed=seed,
    )


@dataclass(frozen=True)
class _Certified:
    majority: int | None
    share: float
    probability: float
    radius: float


@dataclass(frozen=True)
class _Flip:
    radius: float = math.inf
    share: float = math.nan


def _refuse(problem: Problem) -> None:
    if not isinstance(problem.goal, Margin):
        raise InputError("smoothing is about a decision; give a Margin goal (read.decision(), or anchors)")
    if not isinstance(problem.threat, MoveThreat):
        raise UnsupportedThreatError(f"smoothing covers moved tokens, not the threat {problem.threat.key!r}")


def _certified(voters: Voters, smoothing: Smoothing, seed: int) -> _Certified:
    """Choose the majority class on one sample, bound its probability on another."""
    digest, problem = voters.problem.digest, voters.problem
    nowhere = torch.zeros_like(problem.clean.points)
    chosen = int(voters.votes(nowhere, smoothing.selection, _generator(seed, "selection", digest))[:-1].argmax())
    counts = voters.votes(nowhere, smoothing.samples, _generator(seed, "samples", digest))
    share = int(counts[chosen]) / smoothing.samples
    probability = probability_below(int(counts[chosen]), smoothing.samples, 0.5 * smoothing.failure_probability)
    if probability <= 0.5:
        return _Certified(None, share, probability, 0.0)
    radius = smoothing.sigma * NormalDist().inv_cdf(probability) * SAFE
    return _Certified(chosen, share, probability, radius / _frobenius_factor(problem))


def _frobenius_factor(problem: Problem) -> float:
    n, d = problem.clean.points.shape
    return problem.moves.frobenius_factor(n, d) * (1.0 + 1e-12)  # a root of n d, rounded


def _attacked(voters: Voters, smoothing: Smoothing, certified: _Certified, seed: int) -> _Flip:
    """The nearest flip found, grown until fresh votes prove that another class has the larger probability."""
    if certified.majority != 0:  # the search leads away from the model's own label
        return _Flip()
    digest, threat = voters.problem.digest, voters.problem.moves
    first = attack_model(voters.problem, seed=seed)
    voters.queries += first.queries
    start = None if first.perturbed is None else first.perturbed - voters.problem.clean.points
    delta = nearest_flip(voters, start=start, seed=stream(seed, "flip", digest))
    if delta is None:
        return _Flip()
    failure = 0.5 * smoothing.failure_probability / TRIES
    for attempt in range(TRIES):
        stretched = delta * (1.0 + STRETCH * (2**attempt - 1))
        counts = voters.votes(stretched, smoothing.samples, _generator(seed, f"verify {attempt}", digest))
        if _proves_other(counts, failure):
            return _Flip(float(threat.distance(stretched)), int(counts[0]) / smoothing.samples)
    return _Flip()


def _proves_other(counts: Tensor, failure: float) -> bool:
    """Whether some class has a larger probability than the label, except with probability ``failure``.

    The rival is the one with most votes of the same sample, so its bound is a union over all rivals.
    """
    total, rivals = int(counts.sum()), counts[1:-1]
    below = probability_below(int(rivals.max()), total, 0.5 * failure / len(rivals))
    return below > probability_above(int(counts[0]), total, 0.5 * failure)


def _generator(seed: int, purpose: str, digest: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, "smoothing", purpose, digest))
