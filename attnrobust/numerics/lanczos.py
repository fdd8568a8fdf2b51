"""Largest eigenvalue of a symmetric operator: below by Ritz values, above with a stated failure probability."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, solve_banded
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.rounding import SMALLEST
from attnrobust.numerics.sides import Lower, Upper

ROUNDING = 1e-10  # outward share of the operator norm: covers products with errors up to 4e5 units in the last place
STEP_ERROR = 4e-15  # unmeasured error of one Lanczos step in units of the norm; measured: below 2e-15 at N = 2e5
START_ERROR = 1e-15  # rounding of the start vector, in units of its length
CHECK_EVERY = 3  # steps between two evaluations of the bound; each costs about a millisecond
DENSE_LIMIT = 64  # up to this size building the matrix costs no more products than the iteration

Matvec = Callable[[Float[Tensor, "N"]], Float[Tensor, "N"]]


@dataclass(frozen=True, eq=False)
class EigenvalueBounds:
    """Largest eigenvalue of a symmetric operator from both sides.

    Args:
        upper: At least lambda_1, except with ``upper.failure_probability`` over the random start vector.
        lower: Rayleigh quotient of ``vector``, rounded down.
        vector: Unit vector (N,).
        steps: Products with the operator.
    """

    upper: Upper
    lower: Lower
    vector: Float[Tensor, "N"]
    steps: int


def largest_eigenvalue_upper(
    matvec: Matvec,
    size: int,
    *,
    failure_probability: float = 1e-9,
    seed: int = 0,
    tol: float = 1e-3,
    max_steps: int = 200,
    dense_limit: int = DENSE_LIMIT,
    enough: float = -math.inf,
    device: torch.device | str = "cpu",
) -> EigenvalueBounds:
    """Upper bound of the largest eigenvalue of any symmetric operator (indefinite allowed).

    Lanczos from a start v_1 uniform on the sphere gives orthonormal polynomials with ``v_{k+1} = p_k(A) v_1``, so
    ``|p_k(lambda_1)| |<v_1, x_1>| <= 1``; since ``P(|<v_1, x_1>| <= t) <= t sqrt(2N/pi)``, the largest root of
    ``p_k(x) = sqrt(2N/pi)/delta`` is at least lambda_1 except with probability delta, for all k at once (one event).
    Step errors of ``STEP_ERROR`` are inside the bound; the result is moved outward by ``ROUNDING`` of the norm.

    Args:
        matvec: Product with one vector (N,), symmetric.
        size: N.
        failure_probability: delta in (0, 1); 0 is claimed where the matrix is small enough to be decomposed.
        seed: Seed of the start vector.
        tol: Stop once upper - lower <= tol times the largest absolute Ritz value.
        max_steps: Stop anyway; the bound is valid then too, only wider.
        dense_limit: Up to this size the matrix is built and decomposed (deterministic).
        enough: Stop, however wide the gap, once the upper bound is at most this: the caller needs no smaller one.
        device: Device of the vectors.

    Returns:
        Both sides and the Ritz vector.

    Raises:
        InputError: A product that is not finite, or an option outside its range.

    References:
        Hochstenbach 2013, probabilistic upper bounds for the matrix two-norm; proof in docs/spectral-norms.md.
    """
    if size < 1 or not 0.0 < failure_probability < 1.0 or max_steps < 1 or not tol > 0.0:
        raise InputError("need size >= 1, failure_probability in (0, 1), max_steps >= 1 and tol > 0")
    if size <= dense_limit:
        return _dense_bounds(matvec, size, torch.device(device))
    chain = _Chain(matvec, _uniform_direction(size, seed, torch.device(device)), capacity=min(max_steps, size))
    log_start = math.log(failure_probability) - 0.5 * math.log(2.0 * size / math.pi)
    gaps: list[float] = []
    best = math.inf
    while True:
        chain.step()
        finished = chain.steps >= min(max_steps, size) or chain.closed
        if not finished and chain.steps % CHECK_EVERY:
            continue
        ritz, scale = chain.top_ritz_value(), chain.scale()
        best = min(best, _largest_root(chain, ritz, scale, log_start))
        gaps.append(best - ritz)
        if finished or best <= enough or gaps[-1] <= tol * scale or _stalled(gaps, 10.0 * tol * scale):
            break
    margin = ROUNDING * scale
    return EigenvalueBounds(
        upper=Upper(best + margin, failure_probability), lower=Lower(ritz - margin), vector=chain.top_ritz_vector(),
        steps=chain.steps,
    )  # fmt: skip


def _stalled(gaps: list[float], near: float) -> bool:
    """Whether a nearly finished bound no longer improves: step errors limit it, at about STEP_ERROR / delta."""
    return len(gaps) > 5 and gaps[-1] <= near and gaps[-1] > 0.9 * gaps[-6]


def _uniform_direction(size: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit.to(device)


class _Chain:
    """Lanczos with full reorthogonalisation; grows one step at a time."""

    def __init__(self, matvec: Matvec, start: Tensor, *, capacity: int) -> None:
        self.matvec = matvec
        self.basis = start.new_empty(min(capacity, 32) + 1, start.numel())
        self.basis[0] = start
        self.capacity = capacity
        self.alpha: list[float] = []
        self.beta: list[float] = []  # beta[j] couples step j and j + 1
        self.leak = 0.0  # squared sum of what the orthogonalisation removed beside the three-term recurrence
        self.steps = 0
        self.closed = False  # the Krylov space is invariant

    def step(self) -> None:
        j = self.steps
        if j + 2 > self.basis.shape[0]:
            larger = self.basis.new_empty(min(2 * j, self.capacity) + 2, self.basis.shape[1])
            larger[: j + 1] = self.basis[: j + 1]
            self.basis = larger
        found = self.basis[: j + 1]
        image = self.matvec(self.basis[j])
        if not bool(torch.isfinite(image).all()):
            raise InputError("a product with the operator is NaN or infinite; its scores or weights overflow")
        coefficient = found @ image
        image = image - coefficient @ found
        again = found @ image  # a second pass makes the basis orthogonal to working precision
        image = image - again @ found
        coefficient = coefficient + again
        self.alpha.append(float(coefficient[j]))
        expected = self.beta[j - 1] if j else 0.0
        if j:
            coefficient[j - 1] -= expected
        coefficient[j] = 0.0
        self.leak += float(coefficient.square().sum())
        self.steps += 1
        length = float(torch.linalg.vector_norm(image))
        floor = STEP_ERROR * max(self.scale(), SMALLEST)
        self.closed = length <= floor or self.steps >= image.numel()
        # A larger beta makes p_k smaller and its root larger: raising a vanishing one keeps the bound valid.
        self.beta.append(max(length, floor))
        if not self.closed:
            self.basis[j + 1] = image / length

    def scale(self) -> float:
        """Largest absolute Ritz value: the operator norm from below."""
        values = self._ritz_values()
        return float(np.abs(values).max())

    def _ritz_values(self) -> NDArray[np.float64]:
        diagonal, coupling = np.array(self.alpha), np.array(self.beta[: len(self.alpha) - 1])
        return np.asarray(eigh_tridiagonal(diagonal, coupling, eigvals_only=True), dtype=np.float64)

    def top_ritz_value(self) -> float:
        return float(self._ritz_values()[-1])

    def top_ritz_vector(self) -> Tensor:
        k = self.steps
        _, vectors = eigh_tridiagonal(
            np.array(self.alpha), np.array(self.beta[: k - 1]), select="i", select_range=(k - 1, k - 1)
        )
        vector = torch.as_tensor(vectors[:, 0], device=self.basis.device) @ self.basis[:k]
        unit: Tensor = vector / torch.linalg.vector_norm(vector)
        return unit


def _largest_root(chain: _Chain, ritz: float, scale: float, log_start: float) -> float:
    """Smallest x that the recurrence excludes: ``p_k(x) (t - e ||(x - T)^{-1} e_1||) >= 1``, t = exp(log_start).

    It then excludes everything right of x too. The second term is what step errors of total norm e can hide of the
    start component (docs/spectral-norms.md).
    """
    if scale == 0.0:
        return 0.0
    error = math.sqrt(chain.leak + chain.steps * (STEP_ERROR * scale) ** 2)

    def excluded(x: float) -> bool:
        log_p = _log_last_polynomial(chain.alpha, chain.beta, x)
        if log_p + log_start < 0.0:
            return False
        visible = math.exp(log_start) - START_ERROR - error * _first_resolvent_column(chain.alpha, chain.beta, x)
        return visible > 0.0 and log_p + math.log(visible) >= 0.0

    low, gap = ritz, 1e-5 * scale
    while not excluded(ritz + gap):
        low, gap = ritz + gap, 8.0 * gap
        if gap > 1e12 * scale:
            return math.inf
    high = ritz + gap
    while high - low > 1e-2 * (high - ritz):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high


def _log_last_polynomial(alpha: list[float], beta: list[float], x: float) -> float:
    """``log p_k(x)`` right of all its roots, -inf elsewhere; the ratios p_j / p_{j-1} never overflow."""
    total, previous, coupling = 0.0, math.inf, 0.0
    for a, b in zip(alpha, beta, strict=True):
        pivot = (x - a) - coupling / previous
        if not pivot > 0.0:
            return -math.inf
        ratio = pivot / b
        total += math.log(ratio)
        previous, coupling = ratio, b
    return total


def _first_resolvent_column(alpha: list[float], beta: list[float], x: float) -> float:
    """``||(x I - T_k)^{-1} e_1||`` for x right of the Ritz values."""
    k = len(alpha)
    banded = np.zeros((3, k))
    banded[1] = x - np.array(alpha)
    banded[0, 1:] = banded[2, :-1] = -np.array(beta[: k - 1])
    right = np.zeros(k)
    right[0] = 1.0
    return float(np.linalg.norm(solve_banded((1, 1), banded, right)))


def _dense_bounds(matvec: Matvec, size: int, device: torch.device) -> EigenvalueBounds:
    unit = torch.eye(size, dtype=torch.float64, device=device)
    matrix = torch.stack([matvec(row) for row in unit])
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a product with the operator is NaN or infinite; its scores or weights overflow")
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    margin = ROUNDING * float(values.abs().max())
    top = float(values[-1])
    return EigenvalueBounds(Upper(top + margin), Lower(top - margin), vectors[:, -1], size)
