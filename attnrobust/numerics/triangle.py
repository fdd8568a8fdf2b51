"""The small triangle of a tall matrix: what norms and eigenvalues need of it."""

import torch
from jaxtyping import Float
from torch import Tensor


def triangle(matrix: Float[Tensor, "*b d k"]) -> Float[Tensor, "*b r k"]:
    """R of the thin decomposition ``matrix = Q R``, r = min(d, k).

    Q has orthonormal columns, so ``|matrix x| = |R x|``, ``||matrix M|| = ||R M||``, and ``matrix S matrix^T`` has the
    eigenvalues of ``R S R^T`` (and zeros).
    """
    found: Tensor = torch.linalg.qr(matrix, mode="r").R
    return found


def product_norm(left: Float[Tensor, "*b d k"], right: Float[Tensor, "*b e k"]) -> Float[Tensor, "*b"]:
    """``||left right^T||_2`` from the two triangles: no d x e matrix."""
    norms: Tensor = torch.linalg.matrix_norm(triangle(left) @ triangle(right).mT, ord=2)
    return norms
