"""Gradient ascent on spheres: lower bounds of suprema, to hold bounds against."""

from collections.abc import Callable

import torch
from torch import Tensor

Value = Callable[..., Tensor]


def supremum(value: Value, radii: tuple[float, ...], starts: list[tuple[Tensor, ...]], *, steps: int = 60) -> float:
    """Largest value found over products of spheres (and their insides, as it moves by steps of ascent).

    Args:
        value: Differentiable, one number from the variables.
        radii: Norm of each variable.
        starts: Where to start.
        steps: Of ascent from each start.
    """
    best = 0.0
    for start in starts:
        point = tuple(_on_sphere(part, radius) for part, radius in zip(start, radii, strict=True))
        for step in range(steps):
            point = tuple(part.detach().requires_grad_(True) for part in point)
            found = value(*point)
            best = max(best, float(found.detach()))
            slopes = torch.autograd.grad(found, point, allow_unused=True, materialize_grads=True)
            keep = 0.5 if step % 2 else 0.0
            point = tuple(
                _on_sphere(keep * part.detach() / max(radius, 1e-300) + _unit(slope), radius)
                for part, slope, radius in zip(point, slopes, radii, strict=True)
            )
    return best


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(1e-300)


def _on_sphere(x: Tensor, radius: float) -> Tensor:
    return radius * _unit(x.detach())
