"""Constants of the softmax derivative ``diag(p) - p p^T``."""

import torch
from jaxtyping import Float
from torch import Tensor

LIPSCHITZ = 0.5
"""Lipschitz constant of the softmax in every l_r norm, r in [1, inf]; attained (Nair 2025, arXiv 2510.23012)."""


def derivative_norm_upper(weights: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Upper bound ``g_1 = p_1 (1 - p_1 + p_2) <= 1/2`` of ``||diag(p) - p p^T||_2``, p_1 >= p_2 the largest weights.

    Attained where all weights but the largest are equal. The bound is of the type of Yudin et al. 2025
    (arXiv 2507.07814); the proof is in docs/certificates-literature.md, section 7.

    Args:
        weights: Probability vectors.
    """
    top = weights.topk(min(2, weights.shape[-1]), dim=-1).values
    second = top[..., 1] if weights.shape[-1] > 1 else torch.zeros_like(top[..., 0])
    return top[..., 0] * (_rest(weights) + second)


def derivative_norm_lower(weights: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Lower bound ``p_1 (1 - p_1 + p_n)`` of the same norm for n >= 2 weights, p_n the smallest; 0 for n = 1."""
    if weights.shape[-1] == 1:
        return torch.zeros_like(weights[..., 0])
    return weights.amax(dim=-1) * (_rest(weights) + weights.amin(dim=-1))


def _rest(weights: Tensor) -> Tensor:
    """``1 - p_1``, summed from the small weights: at a saturated row the subtraction would lose all its digits."""
    ordered = weights.sort(dim=-1).values
    rest: Tensor = ordered[..., :-1].sum(dim=-1)
    return rest
