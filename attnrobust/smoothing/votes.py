"""Noisy decisions of a network, counted, and what the counts prove about probabilities."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from attnrobust.problem import Problem

CHUNK = 2**24
"""Numbers of the largest state of a network that one batch of noisy inputs may hold (128 MiB)."""
WIDEST = 8
"""Widest state of a network against its tokens: two hidden layers of an MLP, and room for attention."""


class Voters:
    """The model under noise: margins and decisions at noisy tokens, in batches that fit in memory.

    Args:
        problem: A margin problem on moved tokens; the noise is on the tokens that its threat may move.
        sigma: Standard deviation of the noise.
    """

    def __init__(self, problem: Problem, sigma: float) -> None:
        self.problem, self.sigma, self.queries = problem, sigma, 0
        self._moves = problem.moves.movable(problem.clean.n).to(problem.clean.points)[:, None]
        n, d = problem.clean.points.shape
        self.batch = max(1, CHUNK // (n * max(d * WIDEST, n)))

    @property
    def classes(self) -> tuple[int, ...]:
        """The label, then every other class; positions in this tuple are what ``votes`` counts."""
        goal = self.problem.resolved
        assert goal.label is not None  # noqa: S101 - a margin has a label
        return (goal.label, *goal.classes)

    def noise(self, count: int, generator: torch.Generator) -> Iterator[Float[Tensor, "b n d"]]:
        """``count`` draws, batch by batch."""
        shape = self.problem.clean.points.shape
        for start in range(0, count, self.batch):
            size = min(self.batch, count - start)
            yield self.sigma * self._moves * torch.randn(size, *shape, generator=generator, dtype=torch.float64)

    def margins(self, delta: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Margins of the label over every other class at moved tokens; differentiable."""
        self.queries += int(delta.shape[0])
        problem, goal = self.problem, self.problem.resolved
        changes: Tensor = goal.changes(problem.network(problem.clean.points + delta, problem.mass))
        return goal.budgets - changes

    @torch.no_grad()
    def votes(self, delta: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Int[Tensor, "c"]:
        """How often each class is decided at ``clean + delta + noise``, as in ``classes``; last, how often none is."""
        slots = len(self.classes) + 1
        counts = torch.zeros(slots, dtype=torch.int64)
        for noise in self.noise(count, generator):
            counts += torch.bincount(decided(self.margins(delta + noise)), minlength=slots)
        return counts


def decided(margins: Float[Tensor, "b c"]) -> Int[Tensor, "b"]:
    """Position of the decided class: 0, the label, where every margin is positive, else the strongest rival's.

    A tie counts against the label. Margins that are not all finite are no decision for anybody: the position after the
    last class.
    """
    worst, rival = margins.min(dim=-1)
    chosen = torch.where(worst > 0.0, torch.zeros_like(rival), rival + 1)
    return torch.where(torch.isfinite(margins).all(dim=-1), chosen, margins.shape[-1] + 1)


def probability_below(successes: int, samples: int, failure: float) -> float:
    """Lower bound of a probability, wrong with at most ``failure`` (Clopper and Pearson 1934, one-sided)."""
    if successes == 0:
        return 0.0
    return float(stats.beta.ppf(failure, successes, samples - successes + 1))


def probability_above(successes: int, samples: int, failure: float) -> float:
    """Upper bound of a probability, wrong with at most ``failure``."""
    return 1.0 - probability_below(samples - successes, samples, failure)
