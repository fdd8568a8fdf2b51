"""How far the nearest other word is, in a model's own table of embeddings."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

BLOCK = 4096
"""Rows of the table that are compared at once."""


def embedding_table(module: nn.Module) -> Float[Tensor, "words d"] | None:
    """The table of input embeddings that a model names, one row a word; None where it names none."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        table = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return table.weight if isinstance(table, nn.Embedding) else None


def word_distance(table: Float[Tensor, "words d"], ids: Sequence[int], *, without: Sequence[int] = ()) -> float | None:
    r"""Median over tokens of the distance to the nearest other word, as a share of the token's own norm.

    ``median_i min_{j not i} ||e_j - e_i|| / ||e_i||`` over the rows ``e`` of the table. Rows equal to ``e_i`` are the
    same word. It is a yardstick of the table, not of hidden states behind it.

    Args:
        table: The embeddings.
        ids: Rows of the text's tokens.
        without: Rows that count neither as tokens nor as other words, such as special tokens.

    Returns:
        The share; None where no token is left, or a token's row is zero.
    """
    left = torch.tensor([i for i in dict.fromkeys(ids) if i not in set(without)], dtype=torch.long)
    if not len(left):
        return None
    words = table[left.to(table.device)].double()
    norms = torch.linalg.vector_norm(words, dim=-1)
    nearest = torch.full_like(norms, torch.inf)
    for start in range(0, len(table), BLOCK):
        distances = torch.cdist(
            words, table[start : start + BLOCK].double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        distances[:, [w - start for w in without if start <= w < start + distances.shape[1]]] = torch.inf
        distances[distances == 0.0] = torch.inf
        nearest = torch.minimum(nearest, distances.amin(-1))
    share = float((nearest / norms).quantile(0.5))
    return share if norms.min() > 0.0 and share < float("inf") else None
