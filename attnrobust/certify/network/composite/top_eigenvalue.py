"""Largest eigenvalues of batched symmetric operators from above: decomposed where small, else by Lanczos.

Lanczos with one start of failure probability delta meets its step errors at about ``4e-15 / delta``: too much for the
hundreds of norms of one network. Two independent starts of failure probability ``sqrt(delta)`` each, and the larger of
the two bounds, fail only together: with probability delta, at a fraction of the rounding and nearly the same work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.numerics.chance import Chance, stream
from attnrobust.numerics.lanczos import ROUNDING, largest_eigenvalue_upper

DENSE_LIMIT = 400
"""Size up to which the matrix is built: its products come in one batch."""
BATCH_NUMBERS = 2**25
"""Numbers of intermediate results that a batch of products may hold at once (256 MB)."""
TOLERANCE = 5e-2  # of an eigenvalue: 2.5 % of a norm

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    """A symmetric operator by its products.

    Args:
        product: (b, N) -> (b, N).
        size: N.
        weight: Numbers that one product holds at once; it splits batches.
    """

    product: Product
    size: int
    weight: int


def top_eigenvalue(operator: Operator, chance: Chance, *, device: torch.device, tolerance: float = TOLERANCE) -> float:
    """Upper bound of the largest eigenvalue, at least 0; where the matrix is too large it is random, by ``chance``.

    Args:
        operator: The operator; it must not depend on the stream of ``chance``.
        chance: Where failure probability and seed come from.
        device: Of the vectors.
        tolerance: Share of the largest eigenvalue that may be given away.

    References:
        docs/network-composite.md, section 4.
    """
    if operator.size <= DENSE_LIMIT:
        return _decomposed(operator, device)
    share, seed = chance.next_event()
    root = math.sqrt(share) * (1.0 - 1e-12)
    single: Product = lambda v: operator.product(v[None])[0]  # noqa: E731
    runs = [
        largest_eigenvalue_upper(
            single, operator.size, failure_probability=root, seed=stream(seed, run), tol=tolerance, dense_limit=0,
            device=device,
        )
        for run in ("first", "second")
    ]  # fmt: skip
    chance.spend(share)
    return max(_at_least_zero(run.upper.value) for run in runs)


def top_singular_value(
    operator: Operator, chance: Chance, *, device: torch.device, tolerance: float = TOLERANCE
) -> float:
    """The root of ``top_eigenvalue``, rounded outward: a norm where the operator is a Gram operator."""
    return math.sqrt(top_eigenvalue(operator, chance, device=device, tolerance=tolerance)) * (1.0 + ROUNDING)


def _decomposed(operator: Operator, device: torch.device) -> float:
    unit = torch.eye(operator.size, dtype=torch.float64, device=device)
    chunk = max(1, BATCH_NUMBERS // max(operator.weight, 1))
    matrix = torch.cat([operator.product(rows) for rows in unit.split(chunk)])
    if not bool(torch.isfinite(matrix).all()):
        return math.inf
    values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    return _at_least_zero(float(values[-1]) + ROUNDING * float(values.abs().max()))


def _at_least_zero(bound: float) -> float:
    """Infinity in place of NaN, which ``max`` would take for 0."""
    return math.inf if math.isnan(bound) else max(0.0, bound)
