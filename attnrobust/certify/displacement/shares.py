"""Displacement certificate: the shares of the joint bound's five parts (docs section 5)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.numerics.rounding import nonzero

FLOOR = 1e-4  # smallest share
SMALLEST_PART = 1e-30  # of the largest part; parts and weights below count as this while shares are chosen
BALANCE_STEPS = 150  # of the shares' small concave problem; any shares are sound


def balanced_shares(parts: Float[Tensor, "s k"]) -> tuple[Float[Tensor, "k"], float]:
    """Shares theta (sum about 1) that minimise ``max_s sum_k parts_sk / theta_k``, and the root of a lower bound.

    For weights p on the rows, ``min_theta sum_k (p parts)_k / theta_k = (sum_k (p parts)_k^{1/2})^2`` by
    Cauchy-Schwarz, concave in p; exponentiated gradient steps raise it.
    """
    largest = nonzero(parts.max())
    scaled = (parts / largest).cpu().numpy()  # a few numbers: each operation of torch would cost more than its work
    weights = np.full(len(scaled), 1.0 / len(scaled))
    best, value = weights, -1.0
    for step in range(BALANCE_STEPS if len(scaled) > 1 else 1):
        roots = np.sqrt(np.maximum(weights @ scaled, SMALLEST_PART))
        total = float(roots.sum())
        if total > value:
            best, value = weights, total
        gradient = total * (scaled / roots).sum(axis=1)
        raised = np.log(np.maximum(weights, SMALLEST_PART)) + 2.0 / (1.0 + 0.1 * step) * gradient / total**2
        weights = np.exp(raised - raised.max())
        weights /= weights.sum()
    roots = np.sqrt(np.maximum(best @ scaled, 0.0))
    shares = torch.as_tensor(roots, dtype=parts.dtype, device=parts.device)
    return (shares / nonzero(shares.sum())).clamp_min(FLOOR), float(parts.max().sqrt()) * value
