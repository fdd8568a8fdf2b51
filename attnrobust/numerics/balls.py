"""Ball arithmetic (outward rounding end to end) by python-flint, the optional extra ``attnrobust[rigorous]``."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.sides import Upper
from attnrobust.tokens import require_finite

PRECISION = 128  # bits: products of a few hundred terms and ten squarings lose about 40
SQUARINGS = 9  # overestimates by at most rank^(1/1024): 0.7 % at rank 768
CURE = "python-flint is not installed; install the extra: pip install 'attnrobust[rigorous]'"

Ball = Any  # flint.arb: a real number with an error radius
BallMatrix = Any  # flint.arb_mat


def available() -> bool:
    """Whether python-flint is installed."""
    return importlib.util.find_spec("flint") is not None


@contextmanager
def precision(bits: int = PRECISION) -> Iterator[None]:
    """Ball arithmetic in this many bits inside the block.

    Raises:
        InputError: python-flint is missing.
    """
    with _flint().ctx.workprec(bits):
        yield


def _flint() -> Any:
    if not available():
        raise InputError(CURE)
    import flint

    return flint


# ---- numbers and matrices in and out -------------------------------------------------------------------------------


def ball(value: float) -> Ball:
    """A float as an exact ball."""
    return _flint().arb(value)


def ball_matrix(matrix: Float[Tensor, "m n"]) -> BallMatrix:
    """A float64 matrix, exactly."""
    matrix = require_finite("matrix", matrix).cpu()
    return _flint().arb_mat(matrix.tolist())


def from_rows(rows: Sequence[Sequence[Ball]]) -> BallMatrix:
    """A matrix of balls from its rows."""
    return _flint().arb_mat([list(row) for row in rows])


def upper_float(value: Ball) -> float:
    """A float that is at least every number in the ball; infinity where the ball has no finite upper end."""
    top = value.upper()
    if not top.is_finite():
        return math.inf
    nearest = float(top)
    return nearest if ball(nearest) >= top else math.nextafter(nearest, math.inf)


def largest(values: Sequence[Ball]) -> Ball:
    """A ball that holds the maximum."""
    result = values[0]
    for value in values[1:]:
        result = result.max(value)
    return result


def smallest(values: Sequence[Ball]) -> Ball:
    """A ball that holds the minimum."""
    return -largest([-value for value in values])


def root(value: Ball) -> Ball:
    """Square root of a number that is known to be >= 0 (a ball may reach below by its error)."""
    return value.nonnegative_part().sqrt()


# ---- norms ---------------------------------------------------------------------------------------------------------


def frobenius(matrix: BallMatrix) -> Ball:
    """Frobenius norm."""
    total = ball(0.0)
    for entry in matrix.entries():
        total += entry * entry
    return root(total)


def spectral(matrix: BallMatrix, *, squarings: int = SQUARINGS) -> Ball:
    """Upper bound of the spectral norm: ``||M||_2 <= ||(M^T M)^(2^k)||_F^(1/2^(k+1))``."""
    power = matrix.transpose() * matrix if matrix.ncols() <= matrix.nrows() else matrix * matrix.transpose()
    for _ in range(squarings):
        power = power * power
    value = frobenius(power)
    for _ in range(squarings + 1):
        value = root(value)
    return value


def spectral_of_product(left: BallMatrix, right: BallMatrix, *, squarings: int = SQUARINGS) -> Ball:
    """Upper bound of ``||L R^T||_2`` through the small side: its square is the spectral radius of ``(L^T L)(R^T R)``,
    and a spectral radius is at most ``||C^(2^k)||_F^(1/2^k)``.
    """
    if min(left.nrows(), right.nrows()) <= left.ncols():
        return spectral(left * right.transpose(), squarings=squarings)
    power = (left.transpose() * left) * (right.transpose() * right)
    for _ in range(squarings):
        power = power * power
    value = frobenius(power)
    for _ in range(squarings + 1):
        value = root(value)
    return value


def spectral_norm_rigorous(matrix: Float[Tensor, "m n"], *, squarings: int = SQUARINGS, bits: int = PRECISION) -> Upper:
    """Spectral norm from above in ball arithmetic: ``||(A^T A)^(2^k)||_F^(1/2^(k+1))``, rounded outward end to end.

    Args:
        matrix: Any finite matrix; its float64 entries are taken as exact.
        squarings: k; the bound is at most ``rank^(1/2^(k+2))`` times the norm, plus the balls' errors.
        bits: Working precision.

    Returns:
        An upper bound, rounded outward end to end.

    Raises:
        InputError: python-flint is missing, not a matrix, or entries that are not finite.

    References:
        Derived, docs/norm-bounds.md.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise InputError(f"a spectral norm needs a matrix (m, n) with m, n >= 1; got shape {tuple(matrix.shape)}")
    if not 0 <= squarings <= 40 or bits < 53:
        raise InputError("need 0 <= squarings <= 40 and bits >= 53")
    with precision(bits):
        value = upper_float(spectral(ball_matrix(matrix), squarings=squarings))
    return Upper(value)


# ---- softmax -------------------------------------------------------------------------------------------------------


def softmax_rows(scores: BallMatrix, visible: torch.Tensor) -> BallMatrix:
    """Row-wise softmax over the visible entries; hidden ones are exactly 0."""
    rows = []
    for row, seen in zip(scores.tolist(), visible.tolist(), strict=True):
        shift = largest([s for s, v in zip(row, seen, strict=True) if v]).mid()  # any exact number: it cancels
        powers = [(s - shift).exp() if v else ball(0.0) for s, v in zip(row, seen, strict=True)]
        total = powers[0]
        for power in powers[1:]:
            total += power
        rows.append([power / total for power in powers])
    return from_rows(rows)
