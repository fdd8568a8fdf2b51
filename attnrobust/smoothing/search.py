"""Attack on a smoothed decision: tokens whose majority under noise is another class, by ascent through fixed noise."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.smoothing.votes import Voters, decided

FIXED = 64
"""Noise draws that the search looks at; what it finds is verified on fresh ones."""
STEPS = 12
"""Ascent steps at one size."""
SIZES = 8
"""Halvings of the bracket of sizes: less than a hundredth of it is left, as much as the verification adds."""
STEP = 0.3
"""First step as a share of the size; a step as long as the size forgets what the last ones found."""
GROWTH = 2.0
DOUBLINGS = 12


def nearest_flip(voters: Voters, *, start: Float[Tensor, "n d"] | None, seed: int) -> Float[Tensor, "n d"] | None:
    """A small move after which about half of ``FIXED`` noisy decisions are no longer the label's; not verified.

    Minimises ``mean_k sigmoid(margin_k / scale)`` over the threat's set of a size, the margin the smallest of the
    classes and the scale its spread under noise (Salman et al. 2019 descend the same average through a softmax); sizes
    by doubling, then bisection, each from the best direction so far. The first is that of the model's own nearest
    violation: under little noise the two decisions change together.

    Args:
        voters: The model under noise.
        start: A move at which the model's own decision is another one, or None.
        seed: Seed of the fixed noise.

    Returns:
        The move, or None where no size up to ``2^12`` sigma changed the majority.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.cat(list(voters.noise(FIXED, generator)))
    search = _Search(voters, noise, start)
    low, high = 0.0, voters.sigma if start is None else float(voters.problem.moves.distance(start))
    for _ in range(DOUBLINGS):
        if search.flips_at(high):
            break
        low, high = high, GROWTH * high
    if search.found is None:
        return None
    for _ in range(SIZES):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if search.flips_at(middle) else (middle, high)
    return search.found


class _Search:
    """Moves at fixed noise; remembers the direction that worked best and the last one that flipped the majority."""

    def __init__(self, voters: Voters, noise: Float[Tensor, "k n d"], start: Float[Tensor, "n d"] | None) -> None:
        self._voters, self._noise, self._threat = voters, noise, voters.problem.moves
        self._delta = self._threat.steepest(-self._gradient(torch.zeros_like(noise[0]))) if start is None else start
        self.found: Tensor | None = None

    def flips_at(self, size: float) -> bool:
        """Whether a move of this size was found at which at most half of the decisions are the label's."""
        delta = self._threat.project(self._delta * self._grown(self._delta, size), size)
        for step in range(STEPS):
            share, gradient = self._share_and_gradient(delta)
            if share <= 0.5:
                self._delta = self.found = delta
                return True
            away = self._threat.steepest(-gradient) * (STEP * size / math.sqrt(1.0 + step))
            delta = self._threat.project(delta + away, size)
        return False

    def _grown(self, delta: Tensor, size: float) -> float:
        reached = float(self._threat.distance(delta))
        return size / reached if reached > 0.0 else 1.0

    def _gradient(self, delta: Tensor) -> Tensor:
        return self._share_and_gradient(delta)[1]

    def _share_and_gradient(self, delta: Tensor) -> tuple[float, Tensor]:
        """Share of decisions for the label, and the gradient of its smooth stand-in, a batch at a time."""
        total, kept = torch.zeros_like(delta), 0
        for noise in self._noise.split(self._voters.batch):
            moved = delta.clone().requires_grad_()
            margins = self._voters.margins(moved + noise)
            kept += int((decided(margins.detach()) == 0).sum())
            worst = margins.amin(dim=-1)
            scale = worst.detach().abs().mean().clamp_min(torch.finfo(worst.dtype).tiny)
            (gradient,) = torch.autograd.grad(torch.sigmoid(worst / scale).sum(), moved)
            total += gradient
        return kept / len(self._noise), total
