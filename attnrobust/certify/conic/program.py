"""A conic program as plain data, and the lower bound that any multipliers prove for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from attnrobust.numerics.rounding import ENTRY, UNIT, outward

Array = Float[np.ndarray, "..."]
Index = Int[np.ndarray, "..."]
MoveNorm = Literal["frobenius", "l2", "linf", "l1"]


class Cone(StrEnum):
    """The cone K of rows ``s(x) in K``; three-dimensional cones take three consecutive rows each."""

    ZERO = "zero"  # s = 0
    NONNEGATIVE = "nonnegative"  # s >= 0
    SECOND_ORDER = "second order"  # s_0 >= |(s_1, s_2)|
    EXPONENTIAL = "exponential"  # s_1 e^(s_0 / s_1) <= s_2, s_1 > 0, and its closure


# ---- affine functions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Affine:
    """k affine functions ``coef @ x + const`` of the variables of one block.

    Args:
        coef: (k, N).
        const: (k,).
    """

    coef: Float[np.ndarray, "k N"]
    const: Float[np.ndarray, "k"]
    __array_ufunc__: ClassVar[None] = None  # "array - affine" is ours, not numpy's

    def __add__(self, other: "Affine | Array | float") -> "Affine":
        if isinstance(other, Affine):
            return Affine(self.coef + other.coef, self.const + other.const)
        return Affine(self.coef, self.const + other)

    def __neg__(self) -> "Affine":
        return Affine(-self.coef, -self.const)

    def __sub__(self, other: "Affine | Array | float") -> "Affine":
        return self + (-other)

    def __rsub__(self, other: Array | float) -> "Affine":
        return -self + other

    def __mul__(self, factor: Array | float) -> "Affine":
        """Each function times its own factor."""
        factor = np.broadcast_to(np.asarray(factor, dtype=np.float64), self.const.shape)
        return Affine(factor[:, None] * self.coef, factor * self.const)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Affine":
        return Affine(self.coef[rows], self.const[rows])

    def mapped(self, matrix: Float[np.ndarray, "m k"]) -> "Affine":
        """``matrix @ self``."""
        return Affine(matrix @ self.coef, matrix @ self.const)

    def total(self, weights: Array | None = None) -> "Affine":
        """One function: the (weighted) sum."""
        row = np.ones(len(self.const)) if weights is None else np.asarray(weights)
        return self.mapped(row[None, :])

    def repeated(self, count: int) -> "Affine":
        """A single function, ``count`` times."""
        return Affine(np.repeat(self.coef, count, axis=0), np.repeat(self.const, count))

    def values(self, x: Array) -> Array:
        """The functions at one point."""
        return np.asarray(self.coef @ x + self.const)


def interleaved(*parts: Affine) -> Affine:
    """ConeRows (parts_0[0], parts_1[0], parts_2[0], parts_0[1], ...): the layout of three-dimensional cones."""
    size = parts[0].coef.shape[1]
    return Affine(
        np.stack([p.coef for p in parts], axis=1).reshape(-1, size), np.stack([p.const for p in parts], axis=1).ravel()
    )


def stacked(parts: Sequence[Affine]) -> Affine:
    """All functions below each other."""
    return Affine(np.concatenate([p.coef for p in parts]), np.concatenate([p.const for p in parts]))


def product_at_least_square(first: Affine, second: Affine, root: Affine) -> Affine:
    """ConeRows of second-order cones for ``first * second >= root^2``, first + second >= 0."""
    return interleaved(first + second, root * 2.0, first - second)


# ---- where the variables live --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Box:
    """Variables with known bounds: ``lower <= x <= upper``."""

    index: Index
    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class MomentMatrix:
    """Variables that are the entries (a <= b) of a positive semidefinite matrix with bounded trace."""

    index: Index
    size: int
    trace: float

    def matrix(self, gradient: Array) -> Float[np.ndarray, "M M"]:
        """G with ``<G, Omega> = gradient . entries``."""
        out = np.zeros((self.size, self.size))
        rows, columns = np.triu_indices(self.size)
        out[rows, columns] = 0.5 * gradient
        return out + out.T


@dataclass(frozen=True, eq=False)
class Moves:
    """The scaled moves of the tokens.

    Args:
        index: (m, d).
        norm: "frobenius" for all tokens together, or the norm of each token's move.
        size: Bound of that norm.
    """

    index: Int[np.ndarray, "m d"]
    norm: MoveNorm
    size: float

    def support(self, gradient: Float[np.ndarray, "m d"]) -> float:
        """``sup <gradient, x>``: the size times the dual norm."""
        if self.norm == "frobenius":
            return self.size * float(np.linalg.norm(gradient))
        dual = {"l2": 2.0, "linf": 1.0, "l1": np.inf}[self.norm]
        return self.size * float(np.linalg.norm(gradient, ord=dual, axis=1).sum())


@dataclass(frozen=True, eq=False)
class ConeRows:
    """Constraints ``coef @ x + const in K``.

    Args:
        cone: K.
        coef: Sparse (k, N) over all variables.
        const: (k,).
        name: What they say; shown where a test finds one violated.
    """

    cone: Cone
    coef: sparse.csr_array
    const: Float[np.ndarray, "k"]
    name: str


@dataclass(frozen=True, eq=False)
class ConicProgram:
    """``minimise cost . x + offset`` over rows and domains.

    Args:
        cost: (N,).
        offset: Constant of the objective.
        rows: Constraints with multipliers.
        boxes: Known bounds; every variable lies in exactly one of boxes, moments and moves.
        moments: Moment matrices.
        moves: The move of the tokens.
        reach: (N,) largest |x| of each variable over the domains.
    """

    cost: Float[np.ndarray, "N"]
    offset: float
    rows: tuple[ConeRows, ...]
    boxes: tuple[Box, ...]
    moments: tuple[MomentMatrix, ...]
    moves: Moves
    reach: Float[np.ndarray, "N"] = field(repr=False)

    @property
    def variables(self) -> int:
        """N."""
        return len(self.cost)

    @property
    def cones(self) -> int:
        """ConeRows with a multiplier, and moment matrices."""
        return sum(len(r.const) for r in self.rows) + len(self.moments)


# ---- the bound -----------------------------------------------------------------------------------------------------


def repaired_bound(program: ConicProgram, multipliers: Sequence[Array]) -> float:
    """A lower bound of the program's value from any multipliers, feasible or not (weak duality).

    The multipliers are moved into the dual cones; then
    ``cost.x >= cost.x - sum y.s(x) = (cost - A^T y).x - y.b`` and the right side is minimised exactly over boxes,
    moment matrices (``trace * min(0, lambda_min)``) and moves (minus the support function). What a solver leaves in the
    stationarity condition is thereby paid for.

    Args:
        program: The program.
        multipliers: One array per entry of ``program.rows``.

    Returns:
        A lower bound; minus infinity where multipliers are not finite.

    References:
        Derived, docs/conic-certificate.md, "The repaired bound".
    """
    gradient, value, charge = program.cost.copy(), program.offset, 0.0
    size = np.abs(gradient)
    for rows, raw in zip(program.rows, multipliers, strict=True):
        if raw.shape != rows.const.shape or not np.isfinite(raw).all():
            return -np.inf
        y = in_dual_cone(rows.cone, raw)
        gradient -= rows.coef.T @ y
        value -= float(y @ rows.const)
        size += abs(rows.coef).T @ np.abs(y)
        charge += float(np.abs(y) @ np.abs(rows.const))
    charge = ENTRY * (charge + abs(program.offset) + float(size @ program.reach))
    value += sum(_box_minimum(box, gradient[box.index]) for box in program.boxes)
    value += sum(_moment_minimum(block, gradient[block.index]) for block in program.moments)
    value -= outward(program.moves.support(-gradient[program.moves.index]), ENTRY)
    return float(value - charge) if np.isfinite(value - charge) else -np.inf


def _box_minimum(box: Box, gradient: Array) -> float:
    return float(np.minimum(gradient * box.lower, gradient * box.upper).sum())


def _moment_minimum(block: MomentMatrix, gradient: Array) -> float:
    """``min <G, Omega>`` over positive semidefinite Omega with bounded trace."""
    matrix = block.matrix(gradient)
    error = ENTRY * float(np.linalg.norm(matrix))  # a symmetric eigenvalue moves by no more than the error matrix
    return block.trace * min(0.0, float(np.linalg.eigvalsh(matrix)[0]) - error)


def in_dual_cone(cone: Cone, y: Array) -> Array:
    """Multipliers moved into the dual cone K*: ``y.s >= 0`` for every s in K."""
    if cone is Cone.ZERO:
        return y
    if cone is Cone.NONNEGATIVE:
        return np.asarray(np.maximum(y, 0.0))
    triples = y.reshape(-1, 3)
    fixed = _second_order(triples) if cone is Cone.SECOND_ORDER else _exponential(triples)
    return fixed.ravel()


def _second_order(y: Float[np.ndarray, "k 3"]) -> Float[np.ndarray, "k 3"]:
    """The cone is its own dual: raise the first entry."""
    length = outward(np.hypot(y[:, 1], y[:, 2]), UNIT)
    return np.stack([np.maximum(y[:, 0], length), y[:, 1], y[:, 2]], axis=1)


def _exponential(y: Float[np.ndarray, "k 3"]) -> Float[np.ndarray, "k 3"]:
    """Dual cone: ``u < 0, w >= -u e^(v/u - 1)``, or ``u = 0, v >= 0, w >= 0``.

    Every nonzero u < 0 is a tangent ``z >= e^a (x + (1 - a) y)`` of the cone with ``a = 1 - v/u``: keep its direction a
    and raise w to the tangent's height. Where that height overflows the row gives up its multiplier.
    """
    u, v, w = np.minimum(y[:, 0], 0.0), y[:, 1], np.maximum(y[:, 2], 0.0)
    active = u < 0.0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        height = -u * np.exp(np.where(active, v / np.where(active, u, -1.0), 0.0) - 1.0)
    height = height * (1.0 + 1e-14 * (1.0 + np.abs(np.where(active, v / np.where(active, u, -1.0), 0.0))))
    kept = active & np.isfinite(height) & (height <= 1e6 * (1.0 + w))
    return np.where(
        kept[:, None],
        np.stack([u, v, np.maximum(w, height)], axis=1),
        np.stack([np.zeros_like(u), np.maximum(v, 0.0), w], axis=1),
    )
