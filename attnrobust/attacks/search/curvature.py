"""The second order at a point where the first order says that nothing is nearer.

Let s be the used share, D a point of Frobenius length r at which ``g = s'(D) = mu D``, and H = s''(D). Where D + v has
the length r too, ``<D, v> = -|v|^2 / 2``, so to second order the share changes by ``(v^T H v - mu |v|^2) / 2``: D is
the best point of its sphere if and only if ``H <= mu``. Where the ray is linear, H D = 0, and only what H does across
the ray is left to ask. Where ``v^T H v > mu |v|^2`` the point is a saddle: the share may be linear along its ray to the
last bit, and yet it grows to both sides. Equal tokens and other symmetric inputs start there.

For sets that are not Frobenius balls this is a sign to search on, not a condition.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.attacks.search.directions import random_directions, top_eigenvectors
from attnrobust.attacks.search.evaluate import Evaluator

CURVATURE_STEPS = 5
"""Lanczos steps, one gradient each; an eigenvalue from below."""
DIFFERENCE = 1e-4
"""Relative step of the forward difference: its error is far below the share of the multiplier that is asked about."""
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Curvature:
    """The steepest bend of the share across its ray.

    Args:
        direction: Unit vectors (p, n, d), orthogonal to the points.
        excess: ``v^T H v / mu``, (p,): above 1 the point is a saddle; NaN or infinite where nothing can be said.
    """

    direction: Float[Tensor, "p n d"]
    excess: Float[Tensor, "p"]


def top_curvature(
    evaluator: Evaluator,
    points: Float[Tensor, "p n d"],
    targets: Int[Tensor, "p"],
    allowed: Bool[Tensor, "p n"],
    generators: list[torch.Generator],
) -> Curvature:
    """The largest eigenvalue of the share's second derivative across the ray, by Lanczos on differences of gradients.

    Args:
        evaluator: The stacked problems.
        points: One point of each.
        targets: The budget that it attacks.
        allowed: Tokens that may move.
        generators: One random stream per problem.
    """
    target, delta = targets[:, None], points[:, None]
    length = torch.linalg.vector_norm(delta, dim=(-2, -1), keepdim=True).clamp_min(TINY)
    ray, keep = delta / length, allowed[:, None, :, None].to(delta.dtype)
    gradient = evaluator.shares_and_gradient(delta, target)[1]

    def across(v: Tensor) -> Tensor:
        v = v * keep
        tangent: Tensor = v - ray * (v * ray).sum(dim=(-2, -1), keepdim=True)
        return tangent

    def bend(v: Tensor) -> Tensor:
        moved = evaluator.shares_and_gradient(delta + DIFFERENCE * length * across(v), target)[1]
        bent: Tensor = across((moved - gradient) / (DIFFERENCE * length))
        return bent

    start = across(random_directions(generators, 1, points.shape[1:], points))
    vectors, values = top_eigenvectors(bend, start, 1, CURVATURE_STEPS)
    multiplier = (gradient * ray).sum(dim=(-2, -1)) / length[..., 0, 0]
    return Curvature(direction=vectors[:, 0, 0], excess=(values[..., 0] / multiplier)[:, 0])
