"""Displacement certificate: absolute values of third cumulants."""

import torch
from jaxtyping import Float
from torch import Tensor

EIGENVALUE_ERROR = 1e-14  # of a decomposition, in units of the largest eigenvalue


def psd_roots(matrix: Float[Tensor, "*b n n"]) -> tuple[Float[Tensor, "*b n n"], Float[Tensor, "*b n n"]]:
    """Symmetric square roots of positive semidefinite matrices, and those of the roots; never below in any direction.

    A root turns an error of an eigenvalue near 0 into its square root, so eigenvalues are moved outward before each.
    """
    values, vectors = torch.linalg.eigh(matrix)
    found = []
    for _ in range(2):
        values = (values.clamp_min(0.0) + EIGENVALUE_ERROR * values[..., -1:].clamp_min(0.0)).sqrt()
        found.append((vectors * values[..., None, :]) @ vectors.transpose(-1, -2))
    return found[0], found[1]


def cumulant_modulus(
    weights: Float[Tensor, "*b n"], spread: Float[Tensor, "*b n v"]
) -> tuple[Float[Tensor, "*b n n"], Float[Tensor, "*b n n"]]:
    """N, and its symmetric root, with ``|kappa_3(v, l, l)| <= l^T N l`` for every l (docs eq. 12).

    For a unit vector c, ``c . kappa_3(v, l, l) = l^T K_c l`` with ``K_c = D_c - d_c w^T - w d_c^T``,
    ``d_c = (w_j c.vh_j)``, ``D_c = diag(d_c)``. Over an orthonormal basis, ``N = (sum_e K_e^2)^{1/2}`` dominates every
    ``+-K_c``: ``K_c^2 <= sum_e K_e^2`` (Cauchy-Schwarz) and the root is operator monotone.

    Args:
        weights: Softmax weights w.
        spread: Deviations ``vh_j = v_j - E v`` (their weighted mean is 0).
    """
    scaled = weights[..., :, None] * spread
    gram = scaled @ scaled.transpose(-1, -2)
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    pulled = (gram @ weights[..., :, None])[..., 0]
    column, row = weights[..., :, None], weights[..., None, :]
    half = -diagonal[..., :, None] * row - column * gram + pulled[..., :, None] * row
    square = torch.diag_embed(diagonal) + half + half.transpose(-1, -2)
    square = square + weights.square().sum(-1)[..., None, None] * gram
    square = square + diagonal.sum(-1)[..., None, None] * column * row
    return psd_roots(square)
