"""Additive score masks from the boolean masks that models use."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import as_tensor


def additive_mask(hidden: Bool[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The additive mask of a boolean ``attn_mask`` of ``torch.nn.MultiheadAttention``: -inf where True.

    True means hidden there and in ``nn.TransformerEncoder``; in ``scaled_dot_product_attention`` and in transformers it
    means visible (give ``~mask``).

    Args:
        hidden: True where query i may not see key j, (n, n).

    Returns:
        The mask, float64.

    Raises:
        InputError: Not boolean.

    Examples:
        >>> additive_mask(torch.tensor([[False, True], [False, False]]))
        tensor([[0., -inf],
                [0., 0.]], dtype=torch.float64)
    """
    if hidden.dtype is not torch.bool:
        raise InputError(f"hidden must be boolean; got {hidden.dtype}")
    return torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device).masked_fill(hidden, -math.inf)


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

    Examples:
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


def checked_mask(mask: Tensor) -> Float[Tensor, "n n"]:
    """A float64 copy of an additive score mask.

    Raises:
        InputError: Not square, not floating point, NaN or +inf.
    """
    mask = as_tensor("mask", mask)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        raise InputError(f"mask must have shape (n, n); got {tuple(mask.shape)}")
    if not mask.is_floating_point():
        raise InputError(f"mask has dtype {mask.dtype}; give additive scores (0 = visible, -inf = hidden)")
    mask = mask.detach().to(torch.float64, copy=True)
    if bool(torch.isnan(mask).any()) or bool((mask == math.inf).any()):
        raise InputError("mask holds NaN or +inf; only finite numbers and -inf are allowed")
    return mask


def hidden_keys(
    n: int, *, causal: bool, left: int | None, right: int | None, device: torch.device
) -> Bool[Tensor, "n n"] | None:
    """True where key j is behind query i by more than ``left`` or ahead by more than ``right`` (causal: at all).

    Returns:
        The table, or None where nothing limits what a query sees.
    """
    if not causal and left is None and right is None:
        return None
    ahead = 0 if causal else right
    all_hidden = torch.ones(n, n, dtype=torch.bool, device=device)
    hidden = torch.zeros_like(all_hidden) if ahead is None else all_hidden.triu(ahead + 1)
    return hidden if left is None else hidden | all_hidden.tril(-left - 1)
