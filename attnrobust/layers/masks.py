"""Additive score masks from the boolean masks that models use."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError


def padding_mask(hidden: Tensor) -> Float[Tensor, "n n"]:
    """The additive mask that hides whole keys from every query: column j is -inf where ``hidden[j]``.

    Deleting the hidden tokens gives the same output in the rows that stay; with the mask their own rows are still
    computed, and a threat may still move them. Delete padding unless the rows must keep their place.

    Args:
        hidden: True at padding, (n,), as ``key_padding_mask`` of torch.

    Returns:
        The mask, float64.

    Raises:
        InputError: Not one boolean per token, or every token hidden.

    Example:
        >>> padding_mask(torch.tensor([False, True]))
        tensor([[0., -inf],
                [0., -inf]], dtype=torch.float64)
    """
    if hidden.ndim != 1 or hidden.dtype is not torch.bool:
        raise InputError(f"hidden must be one boolean per token; got {hidden.dtype} of shape {tuple(hidden.shape)}")
    if bool(hidden.all()):
        raise InputError("the padding mask hides every token; at least one must stay visible")
    row = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device).masked_fill(hidden, -math.inf)
    return row.expand(hidden.shape[0], -1).contiguous()
