"""Gradient ascent on products of spheres: lower bounds of suprema, to hold bounds against."""

from collections.abc import Callable

import torch
from torch import Tensor

STARTS = 4
TINY = 1e-300


def supremum(
    value: Callable[..., Tensor], radii: tuple[float, ...], sizes: tuple[int, ...], *, steps: int = 12
) -> float:
    """Largest value found over a product of spheres, from random starts.

    Args:
        value: Differentiable: flat variables (b, size) to values (b,).
        radii: Norm of each variable.
        sizes: Numbers in each variable.
        steps: Of ascent.
    """
    points = [
        _on_sphere(torch.randn(STARTS, size, dtype=torch.float64), r) for size, r in zip(sizes, radii, strict=True)
    ]
    best = 0.0
    for step in range(steps):
        points = [part.detach().requires_grad_(True) for part in points]
        found = value(*points)
        best = max(best, float(found.detach().max()))
        slopes = torch.autograd.grad(found.sum(), points, allow_unused=True, materialize_grads=True)
        keep = 0.5 if step % 2 else 0.0
        points = [
            _on_sphere(keep * part.detach() / max(radius, TINY) + _on_sphere(slope, 1.0), radius)
            for part, slope, radius in zip(points, slopes, radii, strict=True)
        ]
    return best


def _on_sphere(x: Tensor, radius: float) -> Tensor:
    return radius * x.detach() / torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True).clamp_min(TINY)
