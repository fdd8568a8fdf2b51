"""Displacement certificate with rotary positions: what one bilinear form for all pairs of tokens made simpler.

Section 4 of docs/rotary-certificates.md. The query part of ``l_j`` in row i is ``T (s k_j R_j - mean) R_i^T``, T the
triangle of ``w_q``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.shared.softmax_rows import SoftmaxRows


def pulled_keys(clean: SoftmaxRows, triangle: Float[Tensor, "h r k"], i: int) -> Float[Tensor, "h n r"]:
    """``T (s k_j R_j - mean) R_i^T`` of row i."""
    centred = clean.keys - clean.weight[:, i, None, :] @ clean.keys
    turned = clean.layer.turned_back(centred, torch.full((clean.n,), i, device=centred.device))
    return turned @ triangle.mT


def query_distances(clean: SoftmaxRows, triangle: Float[Tensor, "h r k"]) -> Float[Tensor, "h n n"]:
    """``|T (s k_j R_j - mean) R_i^T|`` for every i, j."""
    out = torch.empty_like(clean.weight)
    for i in range(clean.n):  # (h, n, r) at a time
        out[:, i] = torch.linalg.vector_norm(pulled_keys(clean, triangle, i), dim=-1)
    return out


def query_covariances(
    clean: SoftmaxRows, triangle: Float[Tensor, "h r k"], values: Float[Tensor, "h n v"], means: Float[Tensor, "h n v"]
) -> Float[Tensor, "h n"]:
    """``||T Cov_i(s k R R_i^T, v)||_2`` of every row."""
    out = clean.weight.new_empty(clean.weight.shape[:2])
    for i in range(clean.n):
        weighted = clean.weight[:, i, :, None] * (values - means[:, i, None])
        out[:, i] = torch.linalg.matrix_norm(pulled_keys(clean, triangle, i).mT @ weighted, 2)
    return out
