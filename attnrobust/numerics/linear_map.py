"""Linear maps by their products, and their largest singular value from below and, separately, from above."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.lanczos import ROUNDING, EigenvalueBounds, largest_eigenvalue_upper
from attnrobust.numerics.sides import Lower, Upper, round_down

__all__ = [
    "EigenvalueBounds",
    "LinearMap",
    "add",
    "largest_eigenvalue_upper",
    "largest_singular_value_lower",
    "largest_singular_value_upper",
    "pool_rows",
    "scale_rows",
    "scale_tokens",
    "select_tokens",
    "transpose",
]

DENSE_LIMIT = 2000  # smaller side up to which a matrix may be built: 2000^2 float64 are 32 MB
ARPACK_LIMIT = 8  # ARPACK needs room for its subspace; below, the matrix is decomposed
OTHER_STREAM = 1_000_003  # added to a seed
CHUNK = 32  # unit vectors pushed through a map at once when a matrix is built

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map given by ``J v`` and ``J^T u``; both take any leading batch dimensions.

    Args:
        matvec: (*b, *in_shape) -> (*b, *out_shape).
        rmatvec: (*b, *out_shape) -> (*b, *in_shape), the transpose.
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        device: Where the vectors live.
    """

    matvec: Product
    rmatvec: Product
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def in_size(self) -> int:
        """Numbers in one input."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Numbers in one output."""
        return math.prod(self.out_shape)

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix, from products with unit vectors.

        Raises:
            InputError: More than ``DENSE_LIMIT**2`` entries.
        """
        if self.in_size * self.out_size > DENSE_LIMIT**2:
            raise InputError(f"a {self.out_size} x {self.in_size} matrix is too large to build; use the products")
        if self.out_size < self.in_size:
            return _images(transpose(self), self.in_size)
        return _images(self, self.out_size).T


def _images(linear: LinearMap, width: int) -> Tensor:
    """Rows: images of the unit vectors of the input space, flattened."""
    out = torch.empty(linear.in_size, width, dtype=torch.float64, device=linear.device)
    for start in range(0, linear.in_size, CHUNK):
        stop = min(start + CHUNK, linear.in_size)
        unit = torch.zeros(stop - start, linear.in_size, dtype=torch.float64, device=linear.device)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        out[start:stop] = linear.matvec(unit.reshape(-1, *linear.in_shape)).reshape(stop - start, width)
    return out


# ---- composition ---------------------------------------------------------------------------------------------------


def transpose(linear: LinearMap) -> LinearMap:
    """The transposed map."""
    return replace(
        linear, matvec=linear.rmatvec, rmatvec=linear.matvec, in_shape=linear.out_shape, out_shape=linear.in_shape
    )


def add(first: LinearMap, second: LinearMap) -> LinearMap:
    """The sum of two maps of equal shapes."""
    if (first.in_shape, first.out_shape) != (second.in_shape, second.out_shape):
        raise InputError("the maps to add have different shapes")
    return replace(
        first,
        matvec=lambda v: first.matvec(v) + second.matvec(v),
        rmatvec=lambda u: first.rmatvec(u) + second.rmatvec(u),
    )


def select_tokens(linear: LinearMap, movable: Bool[Tensor, "n"]) -> LinearMap:
    """Restrict a map on tokens (n, d) to those that may move: its input becomes (m, d)."""
    n, d = linear.in_shape
    if movable.shape != (n,) or not bool(movable.any()):
        raise InputError(f"the selection must have shape ({n},) and hold at least one token")
    if bool(movable.all()):
        return linear
    index = movable.nonzero().flatten().to(linear.device)

    def matvec(v: Tensor) -> Tensor:
        return linear.matvec(v.new_zeros(*v.shape[:-2], n, d).index_copy(-2, index, v))

    return replace(
        linear,
        matvec=matvec,
        rmatvec=lambda u: linear.rmatvec(u).index_select(-2, index),
        in_shape=(int(index.numel()), d),
    )


def scale_tokens(linear: LinearMap, scale: Float[Tensor, "n"]) -> LinearMap:
    """Scale the columns of a map token by token: ``J diag(scale)``."""
    if scale.shape != (linear.in_shape[0],):
        raise InputError(f"the token scale must have shape ({linear.in_shape[0]},)")
    factor = scale[:, None]
    return replace(linear, matvec=lambda v: linear.matvec(v * factor), rmatvec=lambda u: linear.rmatvec(u) * factor)


def scale_rows(linear: LinearMap, scale: Float[Tensor, "n"]) -> LinearMap:
    """Scale the output rows of a map: ``diag(scale) J``."""
    return transpose(scale_tokens(transpose(linear), scale))


def pool_rows(linear: LinearMap, weights: Float[Tensor, "n"] | None) -> LinearMap:
    """Pool output rows with weights: its output becomes (e,); None keeps every row."""
    if weights is None:
        return linear
    if weights.shape != (linear.out_shape[0],):
        raise InputError(f"the row weights must have shape ({linear.out_shape[0]},)")
    return replace(
        linear,
        matvec=lambda v: torch.einsum("n,...ne->...e", weights, linear.matvec(v)),
        rmatvec=lambda u: linear.rmatvec(weights[:, None] * u[..., None, :]),
        out_shape=linear.out_shape[1:],
    )


# ---- largest singular value ----------------------------------------------------------------------------------------


def largest_singular_value_lower(
    linear: LinearMap, *, seed: int = 0, tol: float = 1e-9
) -> tuple[Lower, Float[Tensor, "..."]]:
    """Largest singular value from below, with its right singular vector (ARPACK on the smaller Gram operator).

    Args:
        linear: The map.
        seed: Seed of the start vector.
        tol: Relative accuracy of the squared singular value that ARPACK aims for; the result is a lower bound anyway.

    Returns:
        ``||J v|| / ||v||`` of the returned unit vector v (shape ``in_shape``), rounded down: a lower bound.

    Raises:
        InputError: A product that is not finite.
    """
    wide = linear.out_size < linear.in_size
    vector = _leading_vector(transpose(linear) if wide else linear, seed=seed, tol=tol)
    if wide:
        vector = linear.rmatvec(vector)
    length = torch.linalg.vector_norm(vector)
    if float(length) == 0.0:  # a zero map: any unit vector will do
        vector, length = torch.ones(linear.in_shape, dtype=torch.float64, device=linear.device), None
    vector = vector / (torch.linalg.vector_norm(vector) if length is None else length)
    value = float(torch.linalg.vector_norm(linear.matvec(vector)))
    if not math.isfinite(value):
        raise InputError("a product with the linear map is NaN or infinite; its scores or weights overflow")
    return Lower(round_down(value)), vector


def _leading_vector(linear: LinearMap, *, seed: int, tol: float) -> Tensor:
    size = linear.in_size

    def product(flat: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(np.ascontiguousarray(flat), dtype=torch.float64, device=linear.device)
        image = linear.rmatvec(linear.matvec(v.reshape(linear.in_shape)))
        if not bool(torch.isfinite(image).all()):
            raise InputError("a product with the linear map is NaN or infinite; its scores or weights overflow")
        return image.reshape(-1).cpu().numpy()

    if size <= ARPACK_LIMIT:
        gram = np.stack([product(row) for row in np.eye(size)])
        vector = np.linalg.eigh(0.5 * (gram + gram.T))[1][:, -1]
    else:
        start = np.random.default_rng(seed % 2**64).standard_normal(size)
        if not np.any(product(start)):
            return torch.zeros(linear.in_shape, dtype=torch.float64, device=linear.device)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        try:
            vector = eigsh(operator, k=1, which="LA", v0=start, tol=tol)[1][:, 0]
        except ArpackError:  # clustered top values: our own chain still gives a good vector, and any vector is sound
            return _chain_vector(linear, seed=seed)
    return torch.as_tensor(vector, dtype=torch.float64, device=linear.device).reshape(linear.in_shape)


def _chain_vector(linear: LinearMap, *, seed: int) -> Tensor:
    # Another stream than the upper bound's start vector: what is built from this vector must not depend on that one.
    bounds = largest_eigenvalue_upper(
        _gram(linear), linear.in_size, seed=seed + OTHER_STREAM, tol=1e-6, device=linear.device
    )
    return bounds.vector.reshape(linear.in_shape)


def _gram(linear: LinearMap) -> Product:
    return lambda v: linear.rmatvec(linear.matvec(v.reshape(linear.in_shape))).reshape(-1)


def largest_singular_value_upper(
    linear: LinearMap,
    *,
    failure_probability: float = 1e-9,
    seed: int = 0,
    tol: float = 1e-3,
    dense_limit: int = DENSE_LIMIT,
    max_steps: int = 200,
) -> Upper:
    """Largest singular value from above: decomposed where small (deterministic), else by Lanczos with a random start.

    Args:
        linear: The map.
        failure_probability: delta of the random start; the returned Upper carries it (0 where a matrix was decomposed).
        seed: Seed of the start vector.
        tol: Lanczos stops once upper / lower <= 1 + tol.
        dense_limit: Largest smaller side for which the matrix may be decomposed (at most 2000); 0 forces Lanczos.
        max_steps: Most Lanczos steps; stopping early only widens the bound.

    Returns:
        An upper bound, moved outward by 1e-10 relative for rounding.

    Raises:
        InputError: A product that is not finite.

    References:
        Hochstenbach 2013; proof in docs/spectral-norms.md.
    """
    small = linear if linear.in_size <= linear.out_size else transpose(linear)
    if small.in_size <= min(dense_limit, DENSE_LIMIT):
        return Upper(_decomposed_norm(small) * (1.0 + ROUNDING))
    bounds = largest_eigenvalue_upper(
        _gram(small), small.in_size, failure_probability=failure_probability, seed=seed, tol=2.0 * tol,
        max_steps=max_steps, dense_limit=0, device=small.device,
    )  # fmt: skip
    return Upper(math.sqrt(max(bounds.upper.value, 0.0)) * (1.0 + ROUNDING), bounds.upper.failure_probability)


def _decomposed_norm(small: LinearMap) -> float:
    """Norm of a map with a small input space, from its matrix or, where that is too large, its Gram matrix."""
    if small.in_size * small.out_size <= DENSE_LIMIT**2:
        matrix = small.dense()
        gram = matrix.T @ matrix
    else:
        normal = LinearMap(
            matvec=lambda v: small.rmatvec(small.matvec(v)), rmatvec=lambda u: small.rmatvec(small.matvec(u)),
            in_shape=small.in_shape, out_shape=small.in_shape, device=small.device,
        )  # fmt: skip
        gram = _images(normal, small.in_size)
    if not bool(torch.isfinite(gram).all()):
        raise InputError("a product with the linear map is NaN or infinite; its scores or weights overflow")
    return math.sqrt(max(float(torch.linalg.eigvalsh(0.5 * (gram + gram.T))[-1]), 0.0))
