"""Upper bounds of largest eigenvalues of many small matrices at once (deterministic)."""

import torch
from jaxtyping import Float
from torch import Tensor

DECOMPOSE_LIMIT = 24  # up to this size a batched eigenvalue decomposition is faster than matrix powers are tight
BISECTIONS = 14
OUTWARD = 1.0 + 1e-10


def spread_eigenvalue(
    coefficient: Float[Tensor, "*b n"], weight: Float[Tensor, "*b n"], movable: Float[Tensor, "n"]
) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of ``Z = sum_j a_j (e_j - w)_T (e_j - w)_T^T``, a >= 0.

    Then ``sum_j a_j |delta_j - dbar|^2 <= lambda ||Delta||_F^2`` for Delta supported on T, dbar = sum_l w_l delta_l.
    Z = diag(a_T) - a_T w_T^T - w_T a_T^T + S w_T w_T^T (S = sum of all a) is a diagonal plus rank two: for x above
    max a_T, ``x I - Z`` is positive definite exactly where (S + a R a)(w R w) < (1 + a R w)^2, R = (x - diag a)^{-1}
    (inertia of the bordered matrix). Bisection from the bound ``(sqrt(max a) + sqrt(S) |w_T|)^2`` keeps the upper end.

    Args:
        coefficient: a, any leading dimensions; infinite entries give infinity.
        weight: w, same shape.
        movable: 1 where the token may move, else 0.

    References:
        Derived; docs/margin-certificate.md, lemma 7.
    """
    total = coefficient.sum(-1)
    finite = torch.isfinite(total)
    a = torch.where(finite[..., None], coefficient, 0.0) * movable
    w = weight * movable
    total = torch.where(finite, total, 0.0)
    low = a.amax(-1)
    high = (low.sqrt() + total.sqrt() * torch.linalg.vector_norm(w, dim=-1)) ** 2 * OUTWARD
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        gap = middle[..., None] - a
        safe = gap.clamp_min(1e-300)
        aa, aw, ww = (a * a / safe).sum(-1), (a * w / safe).sum(-1), (w * w / safe).sum(-1)
        # A strict inequality with room for rounding: a wrong "yes" would shrink the bound.
        above = ((total + aa) * ww < (1.0 + aw) ** 2 * (1.0 - 1e-9)) & (gap > 0.0).all(-1)
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return torch.where(finite, high * OUTWARD, torch.inf)


def gram_eigenvalue(gram: Float[Tensor, "*b n n"], coefficient: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of ``sum_j c_j l_j l_j^T`` from the Gram matrix of the l_j, c >= 0.

    It equals that of ``B = C^{1/2} Gram C^{1/2}``; larger matrices use ``lambda <= ||B^8||_F^{1/8}``, at most n^{1/16}
    too large.
    """
    finite = torch.isfinite(coefficient).all(-1)
    root = torch.where(finite[..., None], coefficient, 0.0).sqrt()
    b = gram * root[..., :, None] * root[..., None, :]
    if gram.shape[-1] <= DECOMPOSE_LIMIT:
        value = torch.linalg.eigvalsh(b)[..., -1].clamp_min(0.0)
    else:
        scale = torch.linalg.matrix_norm(b).clamp_min(1e-300)
        power = b / scale[..., None, None]
        for _ in range(2):
            power = power @ power
        value = scale * torch.linalg.matrix_norm(power @ power) ** 0.125
    # Rounding of the decomposition is relative to the norm; powers of tiny matrices only underflow towards 0.
    value = value * OUTWARD + 1e-12 * torch.linalg.matrix_norm(b)
    # Squares of entries beyond 1e154 overflow: infinity times an underflowed power is NaN, which bounds nothing.
    return torch.where(finite & torch.isfinite(value), value, torch.inf)


def symmetric_top(matrix: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b"]:
    """Upper bound of the largest eigenvalue of positive semidefinite matrices."""
    one = matrix.new_ones(matrix.shape[:-1])
    return gram_eigenvalue(matrix, one)
