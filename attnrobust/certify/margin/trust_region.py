"""Upper bounds of ``sup G.D + D M D / 2`` over balls by weak duality; every approximation is on the safe side."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.linear_map import largest_eigenvalue_upper
from attnrobust.numerics.rounding import PROOF, SMALLEST, outward
from attnrobust.numerics.sides import Upper

DECOMPOSE_LIMIT = 320  # an eigenvalue decomposition takes milliseconds up to here
CHOLESKY_LIMIT = 2000
BLOCK_STEPS = 16
RESIDUAL = 1e-6  # of the gradient: smaller ones change no search
START = 1e-9  # of Newton's method above the largest eigenvalue, as a share of the largest number in the problem
NEWTON_STEPS = 40  # of the multiplier; quadratic convergence needs about 6
MAX_RAISES = 80  # of the multiplier by 1 % each until the factorisation succeeds
APART = 0.985  # share of the multiplier that an eigenvalue bound need not get below
SHIFT = 1e-11  # share of a norm that covers the backward error of a factorisation or decomposition

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
        value: Approximate optimal value.
        top: Largest eigenvalue of the form on the space that was searched.
    """

    points: Float[Tensor, "b N"]
    multiplier: float
    value: float
    top: float


def approximate(
    problem: Quadratic, radius: float, starts: Float[Tensor, "b N"], *, steps: int = BLOCK_STEPS, settled: float = 0.0
) -> Maximiser:
    """Solve the trust region in a block Krylov space of G and start vectors.

    Args:
        problem: The quadratic.
        radius: Of the ball.
        starts: Guesses of maximisers.
        steps: Products with the block at most.
        settled: Relative growth of the value by one product that ends the search.
    """
    size = problem.gradient.numel()
    first = torch.linalg.qr(torch.cat([problem.gradient[None], starts]).T[:, :size]).Q.T.contiguous()
    width = first.shape[0]
    rounds = max(1, min(steps, size // width))
    space = _Space(problem, radius, capacity=rounds * width)
    fresh = space.add(first)
    for _ in range(rounds - 1):
        scale = float(torch.linalg.vector_norm(fresh)) + SMALLEST
        for _ in range(2):
            fresh = fresh - (fresh @ space.basis.T) @ space.basis
        if float(torch.linalg.vector_norm(fresh)) <= 1e-10 * scale:
            break
        last = space.value
        fresh = space.add(torch.linalg.qr(fresh.T).Q.T.contiguous())
        if space.value <= (1.0 + settled) * last:
            break
    return space.solution()


def followed(
    problem: Quadratic, radius: float, starts: Float[Tensor, "b N"], *, expansions: int, settled: float = 0.0
) -> Maximiser:
    """Solve the trust region in the span of G, start vectors and the residuals of the solutions found there.

    For problems that differ little from the last ones: one product with the block, then one with a single vector for
    each expansion, where a block Krylov space pays for the whole block at each.

    Args:
        problem: The quadratic.
        radius: Of the ball.
        starts: Maximisers of similar problems.
        expansions: By a residual, at most.
        settled: Relative growth of the value by one expansion that ends the search.
    """
    size = problem.gradient.numel()
    first = torch.linalg.qr(torch.cat([problem.gradient[None], starts]).T[:, :size]).Q.T.contiguous()
    rounds = min(expansions, size - first.shape[0])
    space = _Space(problem, radius, capacity=first.shape[0] + rounds, images=True)
    space.add(first)
    for _ in range(rounds):
        fresh = space.residual()
        if fresh is None:
            break
        last = space.value
        space.add(fresh[None])
        if space.value <= (1.0 + settled) * last:
            break
    return space.solution()


class _Space:
    """The form in a growing subspace: each new vector is met once by all others, and images are kept only if asked.

    Args:
        problem: The quadratic.
        radius: Of the ball.
        capacity: Most vectors.
        images: Whether to keep them, for residuals.
    """

    def __init__(self, problem: Quadratic, radius: float, *, capacity: int, images: bool = False) -> None:
        self.problem, self.radius, self.count = problem, radius, 0
        self._rows = problem.gradient.new_empty(capacity, problem.gradient.numel())
        self._images = torch.empty_like(self._rows) if images else None
        self._small = problem.gradient.new_zeros(capacity, capacity)
        self._gradient = problem.gradient.new_zeros(capacity)
        self.values = self.vectors = self._gradient
        self.value = 0.0

    @property
    def basis(self) -> Float[Tensor, "k N"]:
        """Orthonormal rows."""
        return self._rows[: self.count]

    def add(self, fresh: Float[Tensor, "w N"]) -> Float[Tensor, "w N"]:
        """Add orthonormal rows; their images."""
        old, new = self.count, self.count + fresh.shape[0]
        self.count = new
        self._rows[old:new] = fresh
        images = self.problem.product(fresh)
        if self._images is not None:
            self._images[old:new] = images
        block = self.basis @ images.T
        self._small[:new, old:new], self._small[old:new, :old] = block, block[:old].T
        self._gradient[old:new] = fresh @ self.problem.gradient
        self._solve()
        return images

    def _solve(self) -> None:
        """Eigenvalues and eigenvectors in the subspace, and the largest value there without the constant."""
        small = self._small[: self.count, : self.count]
        self.values, self.vectors = torch.linalg.eigh(0.5 * (small + small.T))
        g = self.vectors.T @ self._gradient[: self.count]
        multiplier = _multiplier(self.values, g, self.radius)
        shares = g / (multiplier - self.values).clamp_min(SMALLEST)
        self.value = 0.5 * float(g @ shares) + 0.5 * multiplier * self.radius**2

    def _inside(self) -> Maximiser:
        """The solution in coordinates of the subspace."""
        inside = Quadratic(self.problem.product, self._gradient[: self.count], self.problem.constant)
        return _small_solution(self.values, self.vectors, inside, self.radius)

    def solution(self) -> Maximiser:
        """The solution in the subspace."""
        inside = self._inside()
        return replace(inside, points=inside.points @ self.basis)

    def residual(self) -> Tensor | None:
        """Direction of ``G - (l - M) x`` across the subspace, x the solution there; None where it holds all of it."""
        assert self._images is not None  # noqa: S101 - who asks for residuals has the images kept
        inside = self._inside()
        x, gradient = inside.points[0], self.problem.gradient
        residual = gradient - inside.multiplier * (x @ self.basis) + x @ self._images[: self.count]
        for _ in range(2):
            residual = residual - (self.basis @ residual) @ self.basis
        size = float(torch.linalg.vector_norm(residual))
        scale = float(torch.linalg.vector_norm(gradient)) + SMALLEST
        return residual / size if size > RESIDUAL * scale else None


def _small_solution(values: Tensor, vectors: Tensor, problem: Quadratic, radius: float) -> Maximiser:
    g = vectors.T @ problem.gradient
    multiplier = _multiplier(values, g, radius)
    x = g / (multiplier - values).clamp_min(SMALLEST)
    missing = max(radius**2 - float(x @ x), 0.0) ** 0.5
    hard = missing > 1e-3 * radius and multiplier <= float(values[-1]) + 1e-6 * abs(float(values[-1])) + SMALLEST * 10
    points = [x]
    if hard:
        fill = torch.zeros_like(x)
        fill[-1] = missing
        points = [x + fill, x - fill]
    value = 0.5 * float(g @ x) + 0.5 * multiplier * radius**2 + problem.constant
    return Maximiser(torch.stack(points) @ vectors.T, multiplier, value, float(values[-1]))


def _multiplier(values: Tensor, g: Tensor, radius: float) -> float:
    """Smallest l >= max(0, largest eigenvalue) with ``|(l - values)^{-1} g| <= radius``.

    Newton's method on ``1 / |(l - values)^{-1} g| = 1 / radius``, concave in l, rises to the root from below.
    """
    linear = float(torch.linalg.vector_norm(g)) / radius
    unit = max(float(values.abs().amax()), linear)
    if unit <= SMALLEST:
        return SMALLEST
    eigenvalues = (values / unit).double().cpu().numpy()  # START is below float32
    terms = (g / (unit * radius)).square().double().cpu().numpy()
    low = max(float(eigenvalues[-1]), 0.0) + START
    high = low + linear / unit
    for _ in range(NEWTON_STEPS):
        gap = low - eigenvalues
        square = float((terms / gap**2).sum())
        if not square > 1.0 + 1e-12:
            return low * unit
        following = min(low + square / float((terms / gap**3).sum()) * (square**0.5 - 1.0), high)
        if following <= low:  # the gap to the largest eigenvalue is known no better; any multiplier above it is sound
            break
        low = following
    return low * unit


def decomposed_bound(problem: Quadratic, radius: float) -> tuple[Upper, Maximiser]:
    """Deterministic: eigenvalue decomposition of the dense matrix (small sizes)."""
    matrix = dense(problem)
    values, vectors = torch.linalg.eigh(matrix)
    shift = SHIFT * float(values.abs().amax())  # backward error of the decomposition: it proves M - shift I only
    solution = _small_solution(values + shift, vectors, problem, radius)
    return Upper(outward(max(solution.value, 0.0), PROOF)), solution


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
    shift = SHIFT * float(torch.linalg.matrix_norm(matrix))
    multiplier = guess.multiplier * (1.0 + 1e-3) + 2.0 * shift + SMALLEST
    for _ in range(MAX_RAISES):
        shifted = -matrix
        shifted.diagonal().add_(multiplier - shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            x = torch.cholesky_solve(problem.gradient[:, None], factor)[:, 0]
            value = 0.5 * float(problem.gradient @ x) + 0.5 * multiplier * radius**2 + problem.constant
            return Upper(outward(max(value, 0.0), PROOF))
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
        max_steps=80, enough=APART * guess.multiplier, device=problem.gradient.device,
    )  # fmt: skip
    top = max(bounds.upper.value, 0.0)
    multiplier = max(guess.multiplier, top * (1.0 + 2e-3) + SMALLEST)
    best = _dual_value(problem, radius, multiplier, top, start=guess.points.mean(0))
    return Upper(outward(max(best, 0.0), PROOF), bounds.upper.failure_probability)


def _dual_value(
    problem: Quadratic, radius: float, multiplier: float, top: float, *, start: Float[Tensor, "N"]
) -> float:
    x, residual = _solve(problem, multiplier, start)
    inner = float(problem.gradient @ x) + float(residual @ x)  # 2 G.x - x (l - M) x = G.x + res.x
    slack = float(residual @ residual) / max(multiplier - top, SMALLEST)
    return 0.5 * (inner + slack + multiplier * radius**2) + problem.constant


def _solve(
    problem: Quadratic, multiplier: float, start: Float[Tensor, "N"], *, steps: int = 30
) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on ``(l - M) x = G`` from a guess; the returned residual is recomputed."""
    target = float(torch.linalg.vector_norm(problem.gradient)) * 1e-3
    x = start
    residual = problem.gradient - (multiplier * x - problem.product(x))
    direction, energy = residual, float(residual @ residual)
    if energy <= target**2:
        return x, residual
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
