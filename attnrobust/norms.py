"""Deterministic upper bounds of the spectral norm of a matrix; every result says its kind.

The probabilistic ones are in ``linear_map``; the ``rigorous`` one is ``rigorous.spectral_norm_rigorous``.
"""

import math
import sys
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.bounds import Upper, round_up
from attnrobust.errors import InputError
from attnrobust.results import Kind
from attnrobust.tokens import require_finite

UNIT = sys.float_info.epsilon  # twice the unit roundoff: the spare factor 2 covers the bookkeeping around a product
SQUARINGS = 10  # leaves a factor of at most rank^(1/2048): 0.33 % at rank 768
SQUARINGS_LIMIT = 40  # past this the factor is 1 in float64


@dataclass(frozen=True)
class SpectralNorm:
    """An upper bound of a spectral norm with its method and kind.

    Args:
        upper: The bound.
        kind: How far it is proved.
        method: How it was found.
    """

    upper: Upper
    kind: Kind
    method: str

    @property
    def value(self) -> float:
        """The bound as a number."""
        return self.upper.value


def spectral_norm_svd(matrix: Float[Tensor, "m n"]) -> SpectralNorm:
    """Largest singular value by a full decomposition in float64, moved outward.

    The decomposition is backward stable: its largest singular value is within a small multiple of ``(m + n) u`` of the
    true one, u the unit roundoff. The outward move is ``16 (m + n) u``, at least 1e-12.

    Args:
        matrix: Any finite matrix; computed in float64.

    Returns:
        An upper bound of kind float64: it rests on the stability of the LAPACK routine.

    Raises:
        InputError: Not a matrix, or entries that are not finite.
    """
    matrix = _checked(matrix)
    value = float(torch.linalg.svdvals(matrix)[0])
    relative = max(1e-12, 8.0 * UNIT * sum(matrix.shape))
    return SpectralNorm(Upper(round_up(value, relative=relative) if value > 0 else 0.0), Kind.FLOAT64, "svd")


def spectral_norm_gram(matrix: Float[Tensor, "m n"], *, squarings: int = SQUARINGS) -> SpectralNorm:
    """Gram iteration: ``||A||_2 <= ||(A^T A)^(2^(k-1))||_F^(1/2^k)`` with the rounding of every product added.

    With ``M_0 = A`` and ``M_(l+1)`` the computed ``M_l^T M_l``, ``||M_l||_2^2 <= ||M_(l+1)||_2 + g_m ||M_l||_F^2``
    where ``g_m = m u / (1 - m u)``; the recursion starts from ``||M_k||_2 <= ||M_k||_F`` and runs back to A. It needs
    products alone, no decomposition.

    Args:
        matrix: Any finite matrix; computed in float64.
        squarings: k; the bound is at most ``rank^(1/2^(k+1))`` times the norm, plus rounding.

    Returns:
        An upper bound of kind float64: it assumes the standard model of a floating-point product (any order of
        summation, fused or not).

    Raises:
        InputError: Not a matrix, entries that are not finite, or a number of squarings outside 0 to 40.

    References:
        Form reported from Delattre et al. 2023 (Gram iteration); the rounding terms are derived, docs/norm-bounds.md.
    """
    if not 0 <= squarings <= SQUARINGS_LIMIT:
        raise InputError(f"squarings must be between 0 and {SQUARINGS_LIMIT}; got {squarings}")
    current = _checked(matrix)
    method = f"gram iteration, {squarings} squarings"
    if not bool(current.any()):
        return SpectralNorm(Upper(0.0), Kind.FLOAT64, method)
    if current.shape[0] < current.shape[1]:
        current = current.T
    exponents: list[int] = []  # M_l was divided by 2^exponents[l], exactly
    errors: list[float] = []  # charged to the square of the norm of M_l
    for level in range(squarings + 1):
        current, exponent = _scaled(current)
        exponents.append(exponent)
        if level < squarings:
            rows = current.shape[0]
            lost = rows * UNIT / (1.0 - rows * UNIT) * float(current.square().sum()) * (1.0 + rows * UNIT * 16)
            errors.append(lost + rows * current.shape[1] * sys.float_info.min)  # the last term: products that vanish
            current = current.T @ current
    bound = float(torch.linalg.vector_norm(current)) * (1.0 + 2.0 * UNIT * current.numel())
    for level in range(squarings - 1, -1, -1):
        bound = math.ldexp(bound, exponents[level + 1])
        bound = math.nextafter(math.sqrt(math.nextafter(bound + errors[level], math.inf)), math.inf)
    # Scaling is exact but for entries below 1e-308 of the largest; two units in the last place cover those.
    value = _ldexp_up(bound * (1.0 + 2.0 * UNIT), exponents[0])
    return SpectralNorm(Upper(value), Kind.FLOAT64, method)


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise InputError(f"a spectral norm needs a matrix (m, n) with m, n >= 1; got shape {tuple(matrix.shape)}")
    return require_finite("matrix", matrix)


def _scaled(matrix: Tensor) -> tuple[Tensor, int]:
    """Divide by the power of two next to the largest entry, so that no product overflows."""
    exponent = math.frexp(float(matrix.abs().max()))[1]
    return torch.ldexp(matrix, torch.tensor(-exponent, device=matrix.device)), exponent


def _ldexp_up(value: float, exponent: int) -> float:
    try:
        return math.nextafter(math.ldexp(value, exponent), math.inf) if value > 0 else 0.0
    except OverflowError:
        return math.inf
