"""Upper bounds of largest eigenvalues of many small matrices at once (deterministic)."""

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.rounding import FORMULA, nonzero, outward

DECOMPOSE_LIMIT = 24  # up to this size a batched eigenvalue decomposition is faster than matrix powers are tight
BISECTIONS = 10  # of a bracket whose ends differ by a factor of at most n
SLACK = 1e-11  # share of the absolute terms of a sum that a strict inequality must exceed
ROUNDING = 1e-15  # of a weight near 1 and of 1 minus it
BACKWARD_ERROR = 1e-12  # of a decomposition, in units of the Frobenius norm


def spread_eigenvalue(
    coefficient: Float[Tensor, "*b n"],
    weight: Float[Tensor, "*b n"],
    movable: Float[Tensor, "*#b n"],
    *,
    bisections: int = BISECTIONS,
) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of ``Z = sum_j a_j (e_j - w)_T (e_j - w)_T^T``, a >= 0, sum of w = 1.

    Then ``sum_j a_j |delta_j - dbar|^2 <= lambda ||Delta||_F^2`` for Delta supported on T, dbar = sum_l w_l delta_l.
    With lengths B_l in place of 0 and 1, T where they are positive, it is that of ``diag(B) Z diag(B)``: the same with
    ``delta_l = B_l d_l`` and the norm of d.
    Z = diag(a_T) - a_T w_T^T - w_T a_T^T + S w_T w_T^T (S = sum of all a) is a diagonal plus rank two, so the signs of
    three sums decide whether ``x I - Z`` is positive definite, above the largest entry of a_T and between the two
    largest ones, where lambda lies at rows with one weight near 1. Bisection in log x keeps the upper end, from the
    smaller one of the trace and ``(sqrt(max a) + sqrt(S) |w_T|)^2``; the trace is at most n times lambda.

    Args:
        coefficient: a, any leading dimensions; infinite entries give infinity.
        weight: w, same shape.
        movable: 1 where the token may move, else 0; or lengths B >= 0.
        bisections: Steps towards the eigenvalue; every number of them gives an upper bound.

    References:
        Derived; docs/margin-certificate.md, lemma 7.
    """
    finite = torch.isfinite(coefficient).all(-1)
    whole = torch.where(finite[..., None], coefficient, 0.0)
    moves, square = (movable > 0.0).to(weight), movable.square()
    a, w = whole * moves, weight * moves
    total, fixed = whole.sum(-1), (whole * (1.0 - moves)).sum(-1)
    missing = 1.0 - w.sum(-1)
    others = (total[..., None] - a).clamp_min(0.0)
    trace = ((a * (1.0 - w) ** 2 + others * w**2) * square).sum(-1)
    largest = a * square
    triangle = (largest.amax(-1).sqrt() + total.sqrt() * torch.linalg.vector_norm(w * movable, dim=-1)) ** 2
    # Each e_j - w is known up to ROUNDING only, which counts where 1 - w is that small and a is not.
    pad = ROUNDING * total.sqrt() * movable.amax(-1).clamp_min(1.0)
    high = (outward(torch.minimum(trace, triangle).sqrt(), FORMULA) + pad) ** 2
    low = trace / moves.sum(-1).clamp_min(1.0)
    if a.shape[-1] > 1:
        low = torch.maximum(low, largest.topk(2, dim=-1).values[..., 1])
    for _ in range(bisections):
        middle = low.sqrt() * high.sqrt()
        above = _definite(middle, a=a, w=w, square=square, fixed=fixed, missing=missing)
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    value = outward((high.sqrt() + pad) ** 2, FORMULA)
    return torch.where(finite & torch.isfinite(value), value, torch.inf)


def spread_slope(
    coefficient: Float[Tensor, "*b n"],
    weight: Float[Tensor, "*b n"],
    movable: Float[Tensor, "*#b n"],
    value: Float[Tensor, "*b"],
) -> Float[Tensor, "*b n"]:
    """Approximate derivative of ``spread_eigenvalue`` in a: ``((e_j - w).(B y))^2`` of its eigenvector y (no bound)."""
    y = spread_vector(coefficient, weight, movable, value) * movable
    slope: Tensor = (y - (weight * y).sum(-1, keepdim=True)).square()
    return slope


def spread_vector(
    coefficient: Float[Tensor, "*b n"],
    weight: Float[Tensor, "*b n"],
    movable: Float[Tensor, "*#b n"],
    value: Float[Tensor, "*b"] | None = None,
) -> Float[Tensor, "*b n"]:
    """Approximate eigenvector y of the matrix of ``spread_eigenvalue``, of length 1 (no bound).

    With x the eigenvalue, y_j ~ ``(w_j (1 + sum w a / (x - a)) / (sum w^2 / (x - a)) - a_j) / (x - a_j)``; with lengths
    B the sums and the differences have a B^2 and w^2 B^2, and y_j one more B_j.
    """
    if value is None:
        value = spread_eigenvalue(coefficient, weight, movable)
    square = movable.square()
    a, w = coefficient * (movable > 0.0), weight * (movable > 0.0)
    inverse = 1.0 / (value[..., None] - a * square)
    cross = (w * a * square * inverse).sum(-1, keepdim=True)
    second = (w * w * square * inverse).sum(-1, keepdim=True)
    y = (w * (1.0 + cross) / second - a) * inverse * movable
    vector: Tensor = (y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    return vector


def _definite(x: Tensor, *, a: Tensor, w: Tensor, square: Tensor, fixed: Tensor, missing: Tensor) -> Tensor:
    """Whether ``x I - B Z B`` is surely positive definite (lemma 7), with room for the rounding of every sum.

    ``S + aB R aB = fixed + x sum a / gap`` and ``1 + aB R wB = missing + x sum w / gap`` cancel less than the left
    sides.

    Args:
        x: Candidates.
        a: Coefficients of the tokens that move.
        w: Weights likewise.
        square: B^2.
        fixed: Sum of the other coefficients.
        missing: Sum of the other weights.
    """
    gap = x[..., None] - a * square
    inverse = 1.0 / gap
    first, second, cross = (a * inverse).sum(-1), (w * w * square * inverse).sum(-1), (w * inverse).sum(-1)
    first, cross = fixed + x * first, missing + x * cross
    size = inverse.abs()
    first_size, cross_size = fixed + x * (a * size).sum(-1), 1.0 + x * (w * size).sum(-1)
    determinant = first * second - cross**2
    room = SLACK * (first_size * (w * w * square * size).sum(-1) + cross_size**2)
    below = (gap < 0.0).sum(-1)
    above = (below == 0) & (determinant < -room)
    between = (below == 1) & (determinant > room) & (first < -SLACK * first_size)
    return (above | between) & (gap != 0.0).all(-1)


def gram_eigenvalue(gram: Float[Tensor, "*b n n"], coefficient: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of ``sum_j c_j l_j l_j^T`` from the Gram matrix of the l_j, c >= 0.

    It equals that of ``B = C^{1/2} Gram C^{1/2}``; larger matrices use ``power_eigenvalue``, at most n^{1/16} too
    large.
    """
    finite = torch.isfinite(coefficient).all(-1)
    root = torch.where(finite[..., None], coefficient, 0.0).sqrt()
    b = gram * root[..., :, None] * root[..., None, :]
    finite = finite & torch.isfinite(b).all(-1).all(-1)  # a decomposition of infinite entries raises
    b = torch.where(finite[..., None, None], b, 0.0)
    if gram.shape[-1] <= DECOMPOSE_LIMIT:
        value = outward(torch.linalg.eigvalsh(b)[..., -1].clamp_min(0.0), FORMULA)
    else:
        value = power_eigenvalue(b, squarings=3)
    value = value + BACKWARD_ERROR * torch.linalg.matrix_norm(b)
    # Squares of entries beyond 1e154 overflow: infinity times an underflowed power is NaN, which bounds nothing.
    return torch.where(finite & torch.isfinite(value), value, torch.inf)


def power_eigenvalue(matrix: Float[Tensor, "*b n n"], *, squarings: int) -> Float[Tensor, "*b"]:
    """``||M^p||_F^{1/p}``, p = 2^squarings: at least the largest eigenvalue of a positive semidefinite M.

    It is at most ``n^{1/(2 p)}`` times it. NaN where squares overflow; the callers report such a bound as infinite.
    """
    scale = nonzero(matrix.abs().amax(dim=(-2, -1)))  # powers of what is far below it would vanish
    power = matrix / scale[..., None, None]
    for _ in range(squarings):
        power = power @ power
    value: Tensor = scale * torch.linalg.matrix_norm(power) ** 0.5**squarings
    return outward(value, FORMULA)


def symmetric_top(matrix: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of positive semidefinite matrices."""
    one = matrix.new_ones(matrix.shape[:-1])
    return gram_eigenvalue(matrix, one)
