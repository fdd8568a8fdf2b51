"""Upper bounds of ``sup G.D + D M D / 2`` over balls by weak duality; every approximation is on the safe side."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.bounds import Upper
from attnrobust.linear_map import largest_eigenvalue_upper

DECOMPOSE_LIMIT = 320  # an eigenvalue decomposition takes milliseconds up to here
CHOLESKY_LIMIT = 2000
BLOCK_STEPS = 16
MAX_RAISES = 80  # of the multiplier by 1 % each until the factorisation succeeds
OUTWARD = 1e-9  # outward share of a bound: rounding of products and factorisations
TINY = 1e-300

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``constant + G.D + D M D / 2`` with M symmetric, as products.

    Args:
        product: (*b, N) -> (*b, N), batched.
        gradient: G.
        constant: Added to every value.
    """

    product: Product
    gradient: Float[Tensor, "N"]
    constant: float = 0.0


@dataclass(frozen=True, eq=False)
class Maximiser:
    """Approximate solution; nothing about it is claimed.

    Args:
        points: Near-maximisers (b, N) of norm at most the radius (two in the hard case).
        multiplier: Approximate optimal multiplier.
        top: Approximate leading eigenvector.
        value: Approximate optimal value.
    """

    points: Float[Tensor, "b N"]
    multiplier: float
    top: Float[Tensor, "N"]
    value: float


def approximate(problem: Quadratic, radius: float, start: Tensor, *, steps: int = BLOCK_STEPS) -> Maximiser:
    """Solve the trust region in a block Krylov space of G and a start vector (a guess of the leading eigenvector)."""
    size = problem.gradient.numel()
    block = torch.stack([problem.gradient, start], dim=1)
    basis, _ = torch.linalg.qr(block)
    images = problem.product(basis.T).T
    pieces, products = [basis], [images]
    while 2 * len(pieces) + 2 <= min(2 * steps, size):
        found = torch.cat(pieces, dim=1)
        fresh = products[-1] - found @ (found.T @ products[-1])
        fresh = fresh - found @ (found.T @ fresh)
        if float(torch.linalg.vector_norm(fresh)) <= 1e-10 * float(torch.linalg.vector_norm(products[-1]) + TINY):
            break
        fresh, _ = torch.linalg.qr(fresh)
        pieces.append(fresh)
        products.append(problem.product(fresh.T).T)
    basis, images = torch.cat(pieces, dim=1), torch.cat(products, dim=1)
    small = basis.T @ images
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    return _small_solution(values, basis @ vectors, problem, radius)


def _small_solution(values: Tensor, vectors: Tensor, problem: Quadratic, radius: float) -> Maximiser:
    g = vectors.T @ problem.gradient
    multiplier = _multiplier(values, g, radius)
    x = g / (multiplier - values).clamp_min(TINY)
    missing = max(radius**2 - float(x @ x), 0.0) ** 0.5
    hard = missing > 1e-3 * radius and multiplier <= float(values[-1]) + 1e-6 * abs(float(values[-1])) + TINY * 10
    points = [x]
    if hard:
        fill = torch.zeros_like(x)
        fill[-1] = missing
        points = [x + fill, x - fill]
    value = 0.5 * float(g @ (g / (multiplier - values).clamp_min(TINY))) + 0.5 * multiplier * radius**2
    value += problem.constant
    return Maximiser(torch.stack(points) @ vectors.T, multiplier, vectors[:, -1], value)


def _multiplier(values: Tensor, g: Tensor, radius: float) -> float:
    """Smallest l >= max(0, largest eigenvalue) with ``|(l - values)^{-1} g| <= radius`` (bisection)."""
    top = float(values[-1])
    scale = max(abs(top), float(values.abs().amax()))
    low = max(top, 0.0) + 1e-9 * scale + 1e-200
    high = low + float(torch.linalg.vector_norm(g)) / radius
    if float(((g / (low - values)) ** 2).sum()) <= radius**2:
        return low
    for _ in range(60):
        middle = 0.5 * (low + high)
        if float(((g / (middle - values)) ** 2).sum()) > radius**2:
            low = middle
        else:
            high = middle
    return high


def decomposed_bound(problem: Quadratic, radius: float) -> tuple[Upper, Maximiser]:
    """Deterministic: eigenvalue decomposition of the dense matrix (small sizes)."""
    matrix = dense(problem)
    values, vectors = torch.linalg.eigh(matrix)
    shift = 1e-11 * float(values.abs().amax())  # backward error of the decomposition: it proves M - shift I only
    solution = _small_solution(values + shift, vectors, problem, radius)
    return Upper(max(solution.value, 0.0) * (1.0 + OUTWARD)), solution


def dense(problem: Quadratic) -> Float[Tensor, "N N"]:
    """The symmetrised matrix, from products with unit vectors."""
    size = problem.gradient.numel()
    out = problem.gradient.new_empty(size, size)
    chunk = max(1, min(size, 4_000_000 // size))
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        unit = out.new_zeros(stop - start, size)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        out[start:stop] = problem.product(unit)
    return 0.5 * (out + out.T)


def factorised_bound(problem: Quadratic, radius: float, guess: Maximiser) -> Upper:
    """Deterministic: ``G (l - M)^{-1} G / 2 + l r^2 / 2`` with l > lambda_max(M) proved by a Cholesky factorisation.

    The factorisation is of ``(l - shift) I - M`` with shift = 1e-11 ||M||_F, which covers its backward error; solving
    with the smaller matrix only enlarges the value.
    """
    matrix = dense(problem)
    shift = 1e-11 * float(torch.linalg.matrix_norm(matrix))
    multiplier = guess.multiplier * (1.0 + 1e-3) + 2.0 * shift + TINY
    for _ in range(MAX_RAISES):
        shifted = -matrix
        shifted.diagonal().add_(multiplier - shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            x = torch.cholesky_solve(problem.gradient[:, None], factor)[:, 0]
            value = 0.5 * float(problem.gradient @ x) + 0.5 * multiplier * radius**2 + problem.constant
            return Upper(max(value, 0.0) * (1.0 + OUTWARD))
        multiplier = 1.01 * multiplier + shift
    return Upper(math.inf)


def iterated_bound(
    problem: Quadratic, radius: float, guess: Maximiser, *, failure_probability: float, seed: int
) -> Upper:
    """Probabilistic: the dual value with ``lambda_up >= lambda_max`` from Lanczos with a random start.

    For l > lambda_up and any x, with ``res = G - (l - M) x``:
    ``G (l - M)^{-1} G <= 2 G.x - x (l - M) x + |res|^2 / (l - lambda_up)``.
    """
    bounds = largest_eigenvalue_upper(
        problem.product, problem.gradient.numel(), failure_probability=failure_probability, seed=seed, tol=3e-3,
        max_steps=80, device=problem.gradient.device,
    )  # fmt: skip
    top = max(bounds.upper.value, 0.0)
    best = _dual_value(problem, radius, max(guess.multiplier, top * (1.0 + 2e-3) + TINY), top)
    return Upper(max(best, 0.0) * (1.0 + OUTWARD), bounds.upper.failure_probability)


def _dual_value(problem: Quadratic, radius: float, multiplier: float, top: float) -> float:
    x, residual = _solve(problem, multiplier)
    inner = float(problem.gradient @ x) + float(residual @ x)  # 2 G.x - x (l - M) x = G.x + res.x
    slack = float(residual @ residual) / max(multiplier - top, TINY)
    return 0.5 * (inner + slack + multiplier * radius**2) + problem.constant


def _solve(problem: Quadratic, multiplier: float, *, steps: int = 30) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on ``(l - M) x = G``; the returned residual is recomputed."""
    target = float(torch.linalg.vector_norm(problem.gradient)) * 1e-3
    x = torch.zeros_like(problem.gradient)
    residual = problem.gradient.clone()
    direction, energy = residual, float(residual @ residual)
    for _ in range(steps):
        image = multiplier * direction - problem.product(direction)
        curvature = float(direction @ image)
        if not curvature > 0.0:
            break
        length = energy / curvature
        x = x + length * direction
        residual = residual - length * image
        previous, energy = energy, float(residual @ residual)
        if energy <= target**2:
            break
        direction = residual + energy / previous * direction
    return x, problem.gradient - (multiplier * x - problem.product(x))
