"""Trust regions of many small matrices at once: approximate while parameters are searched, then certified."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.rounding import PROOF, outward

DECOMPOSE_LIMIT = 96  # up to here the eigenvalue decompositions are cheap enough to be used in every round
KRYLOV_STEPS = 14
MAX_RAISES = 60  # of a multiplier, by 1 % each, until its factorisation succeeds
SMALLEST_MULTIPLIER = 1e-200  # above the largest eigenvalue of a matrix that vanishes
SHIFT = 1e-11  # share of the Frobenius norm that covers the backward error of a factorisation or decomposition


def many_approximate(
    matrix: Float[Tensor, "*b l d d"], gradient: Float[Tensor, "*b l d"], radius: float
) -> tuple[Float[Tensor, "*b l"], Float[Tensor, "p *b l d"], Float[Tensor, "*b l"]]:
    """Approximate ``max G.x + x M x / 2`` over |x| <= radius: values, near-maximisers and multipliers (no claim)."""
    if matrix.shape[-1] <= DECOMPOSE_LIMIT:
        values, vectors = torch.linalg.eigh(matrix)
        return _solve(values, vectors, gradient, radius)
    return many_iterated(lambda block: matrix @ block, gradient, radius)


def many_iterated(
    product: Callable[[Tensor], Tensor],
    gradient: Float[Tensor, "*b l d"],
    radius: float,
    *,
    second: Float[Tensor, "p *b l d"] | None = None,
    steps: int = KRYLOV_STEPS,
) -> tuple[Float[Tensor, "*b l"], Float[Tensor, "p *b l d"], Float[Tensor, "*b l"]]:
    """The same for matrices that are only known by their products with blocks (l, d, columns).

    Args:
        product: ``M @ block``.
        gradient: G.
        radius: The ball.
        second: Near-maximisers of a similar problem: where the search starts, next to G.
        steps: Products with a block.
    """
    if second is None:
        start = torch.cos(torch.arange(1, gradient.shape[-1] + 1, dtype=gradient.dtype, device=gradient.device) ** 2)
        second = start.expand_as(gradient)[None]
    basis = _krylov_basis(product, torch.stack([gradient, *second], dim=-1), steps)
    small = basis.mT @ product(basis)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.mT))
    return _solve(values, basis @ vectors, gradient, radius)


def _krylov_basis(product: Callable[[Tensor], Tensor], block: Tensor, steps: int) -> Float[Tensor, "*b l d m"]:
    """Orthonormal basis of a block Krylov space."""
    parts = [torch.linalg.qr(block).Q]
    for _ in range(steps - 1):
        found = torch.cat(parts, dim=-1)
        fresh = product(parts[-1])
        for _ in range(2):
            fresh = fresh - found @ (found.mT @ fresh)
        parts.append(torch.linalg.qr(fresh).Q)
    # Blocks of an exhausted space are rounding noise: orthonormalise once more.
    basis: Tensor = torch.linalg.qr(torch.cat(parts, dim=-1)).Q
    return basis


def _solve(values: Tensor, vectors: Tensor, gradient: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    g = (vectors.mT @ gradient[..., None])[..., 0]
    start = values[..., -1].clamp_min(0.0) + PROOF * values.abs().amax(-1) + SMALLEST_MULTIPLIER

    def length(multiplier: Tensor) -> Tensor:
        found: Tensor = torch.linalg.vector_norm(g / (multiplier[..., None] - values), dim=-1)
        return found

    hard = length(start) <= radius
    low, high = start, start + torch.linalg.vector_norm(gradient, dim=-1) / radius
    for _ in range(50):
        middle = 0.5 * (low + high)
        outside = length(middle) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    multiplier = torch.where(hard, start, high)
    x = g / (multiplier[..., None] - values)
    value = 0.5 * (g * x).sum(-1) + 0.5 * multiplier * radius**2
    fill = torch.zeros_like(x)
    fill[..., -1] = (radius**2 - x.square().sum(-1)).clamp_min(0.0).sqrt()
    points = torch.stack([x + fill, x - fill])
    return value, (vectors @ points[..., None])[..., 0], multiplier


def many_certified(
    matrix: Float[Tensor, "l d d"], gradient: Float[Tensor, "l d"], radius: float, multiplier: Float[Tensor, "l"]
) -> Float[Tensor, "l"]:
    """Upper bounds ``G (m - M)^{-1} G / 2 + m r^2 / 2`` of the maxima; deterministic.

    m starts a little above the guess and rises until ``(m - shift) I - M`` has a Cholesky factor, which proves m > M;
    solving with the smaller matrix only enlarges the value.
    """
    matrix = 0.5 * (matrix + matrix.mT)
    shift = SHIFT * torch.linalg.matrix_norm(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    level = multiplier * (1.0 + 1e-4) + 2.0 * shift + SMALLEST_MULTIPLIER
    factor, info = torch.linalg.cholesky_ex((level - shift)[:, None, None] * eye - matrix)
    for _ in range(MAX_RAISES):
        if bool((info == 0).all()):
            break
        level = torch.where(info == 0, level, 1.01 * level + shift)
        factor, info = torch.linalg.cholesky_ex((level - shift)[:, None, None] * eye - matrix)
    x = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    value = 0.5 * (gradient * x).sum(-1) + 0.5 * level * radius**2
    return torch.where(info == 0, outward(value, PROOF), torch.inf)
