"""Contractions iterated to their fixed points: where a stack of one layer with shared weights ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.token_map import TokenMap
from attnrobust.lipschitz.contraction import contraction, iterations_needed
from attnrobust.numerics.sides import Lower, Upper, round_up
from attnrobust.numerics.transport import Order, coupling_cost
from attnrobust.tokens import TokenMeasure, as_measure, as_number

MOST_ITERATIONS = 100_000
STALLED = 8.0 * torch.finfo(torch.float64).eps
"""Rounding of an iterate relative to its largest entry; the iteration can do no better."""


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Where an iteration ended.

    Args:
        tokens: The last iterate.
        iterations: Evaluations of the layer.
        certified_iterations: How many the proved rate needs at most for the tolerance.
        rate: Proved rate.
        measured_rate: Largest ratio of successive steps, less the rounding of the iterates.
        error: Bound of the distance to the fixed point: ``(q s + r) / (1 - q)`` after a last step s, proved for exact
            iterates; r stands for their rounding, 8 units in the last place of the largest entry, and is no proof.
        tolerance: The distance that was asked for.
        steps: Length of every step.
    """

    tokens: Float[Tensor, "n d"]
    iterations: int
    certified_iterations: int
    rate: Upper
    measured_rate: Lower
    error: Upper
    tolerance: float
    steps: tuple[float, ...]

    @property
    def reached(self) -> bool:
        """Whether the error is within the tolerance; not where rounding or the number of iterations ends it first."""
        return self.error.value <= self.tolerance


def fixed_point(
    layer: TokenMap,
    clean: TokenMeasure,
    *,
    radius: float,
    order: Order = 2,
    tolerance: float = 1e-9,
) -> FixedPoint:
    """Apply one layer again and again until its measure is within a tolerance of the fixed point in W_p.

    The proof of the mean-field constant holds for every coupling, so token by token the coupling cost of successive
    measures shrinks by the rate, and the error after a step of cost s is at most ``q s / (1 - q)``.

    Args:
        layer: See ``contraction``.
        clean: The input; its tokens lie in the ball.
        radius: R.
        order: p.
        tolerance: Distance in W_p, > 0.

    Returns:
        The tokens after the last layer; they keep the masses of the input. ``reached`` says whether rounding let the
        iteration come as near as asked.

    Raises:
        UnsupportedModelError: A layer without a known constant, see ``contraction``.
        InputError: No contraction is proved, a clean token outside of the ball, a tolerance that is not positive.

    References:
        docs/infinite-depth.md, section 1.

    Examples:
        >>> import torch
        >>> from attnrobust.layers.attention import Attention
        >>> w = torch.full((1, 1, 1), 0.1)
        >>> layer = Attention(w_q=w, w_k=w, w_v=w, b_o=torch.ones(1))
        >>> end = fixed_point(layer, TokenMeasure(torch.tensor([[0.5], [-2.0]])), radius=2.0)
        >>> [round(float(x), 6) for x in end.tokens]  # x = 0.1 x + 1
        [1.111111, 1.111111]
    """
    known = contraction(layer, radius=radius, order=order)
    known.require()
    clean, tolerance = as_measure(clean), as_number("the tolerance", tolerance)
    if clean.width != layer.width:
        raise InputError(f"the tokens have width {clean.width}, the layer takes {layer.width}")
    longest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
    if longest > radius:
        raise InputError(f"a clean token has norm {longest:.6g}, outside of the ball of radius {radius:.6g}")
    mass = None if clean.uniform else clean.mass

    def length(step: Tensor) -> float:
        return float(coupling_cost(step, clean.mass, order=order))

    return iterate(lambda x: layer(x, mass), clean.points, known.rate, length, tolerance)


def iterate(
    step: Callable[[Tensor], Tensor],
    start: Float[Tensor, "n d"],
    rate: Upper,
    length: Callable[[Tensor], float],
    tolerance: float,
) -> FixedPoint:
    """Iterate a contraction until the error is within the tolerance, or until rounding is all that moves.

    Args:
        step: The map.
        start: Where to begin.
        rate: Its proved Lipschitz constant q < 1 in ``length``.
        length: Length of a step.
        tolerance: Distance to the fixed point, > 0.

    Raises:
        InputError: A tolerance that is not positive, or values that are not finite.
    """
    q = rate.value
    steps: list[float] = []
    needed, rounding, error = MOST_ITERATIONS, 0.0, math.inf
    with torch.no_grad():
        x = start.to(torch.float64)
        for _ in range(MOST_ITERATIONS):
            moved = step(x)
            steps.append(length(moved - x))
            if not math.isfinite(steps[-1]):
                raise InputError("the iteration left float64; the layer overflows at these tokens")
            if len(steps) == 1:
                needed = iterations_needed(q, steps[0] / (1.0 - q), tolerance)
            x = moved
            rounding = STALLED * length(torch.full_like(x, float(x.abs().max())))
            error = round_up((q * steps[-1] + rounding) / (1.0 - q))
            if error <= tolerance or steps[-1] <= rounding:
                break
    # Each step is a difference of iterates that are rounded.
    ratios = [(after - rounding) / (before + rounding) for before, after in pairwise(steps)]
    return FixedPoint(
        tokens=x,
        iterations=len(steps),
        certified_iterations=max(needed, 1),
        rate=rate,
        measured_rate=Lower(max([0.0, *ratios])),
        error=Upper(error),
        tolerance=tolerance,
        steps=tuple(steps),
    )
