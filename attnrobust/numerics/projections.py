"""Euclidean projection of non-negative lengths onto ``sum_i weight_i length_i <= budget``: one common drop."""

import torch
from jaxtyping import Float
from torch import Tensor


def shortened(
    length: Float[Tensor, "*b n"], budget: Float[Tensor, "..."] | float, weight: Float[Tensor, "n"] | None = None
) -> Float[Tensor, "*b n"]:
    """Lengths of the nearest point of the ball, in the (weighted) l2 distance: ``max(length - drop, 0)``.

    Lengths inside the ball stay bit for bit.

    Args:
        length: Lengths >= 0.
        budget: Bound of their weighted sum, > 0; a tensor has a last dimension of 1.
        weight: Positive weights of both the sum and the distance; None for ones.

    References:
        Sort and threshold, Duchi et al. 2008; with weights the same by the first-order conditions.
    """
    weight = torch.ones_like(length) if weight is None else weight.expand_as(length)
    ordered, index = length.sort(dim=-1, descending=True)
    sorted_weight = weight.gather(-1, index)
    level = ((sorted_weight * ordered).cumsum(dim=-1) - budget) / sorted_weight.cumsum(dim=-1)
    active = (ordered > level).sum(dim=-1, keepdim=True).clamp_min(1)
    drop = level.expand_as(ordered).gather(-1, active - 1).clamp_min(0.0)
    inside = (weight * length).sum(dim=-1, keepdim=True) <= budget
    return torch.where(inside, length, (length - drop).clamp_min(0.0))
