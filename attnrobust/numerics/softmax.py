"""Constants of the softmax derivative ``diag(p) - p p^T``."""

import torch
from jaxtyping import Float
from torch import Tensor


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


def _rest(weights: Tensor) -> Tensor:
    """``1 - p_1``, summed from the small weights: at a saturated row the subtraction would lose all its digits."""
    ordered = weights.sort(dim=-1).values
    rest: Tensor = ordered[..., :-1].sum(dim=-1)
    return rest
