"""The nearest other word in a table of embeddings."""

import pytest
import torch
from torch import nn

from attnrobust.models import word_distance as module
from attnrobust.models.word_distance import embedding_table, word_distance

TABLE = torch.tensor([[3.0, 0.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [3.0, 1.0], [3.0, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("block", [2, 4096])
def test_the_distance_is_a_share_of_the_words_own_norm(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Row 5 is the nearest to row 0; to rows 1 and 2, which are equal, it is row 4, at distance 3."""
    monkeypatch.setattr(module, "BLOCK", block)
    assert word_distance(TABLE, [0]) == pytest.approx(0.1 / 3.0)
    assert word_distance(TABLE, [1]) == pytest.approx(3.0 / 5.0)
    assert word_distance(TABLE, [0], without=[5]) == pytest.approx(1.0 / 3.0)
    assert word_distance(TABLE, [0, 0, 1, 5], without=[5]) == pytest.approx(0.5 * (1.0 / 3.0 + 3.0 / 5.0))


def test_nothing_to_measure() -> None:
    assert word_distance(TABLE, [3]) is None
    assert word_distance(TABLE, [0], without=[0]) is None
    assert word_distance(TABLE[1:3], [0]) is None


def test_models_without_a_table() -> None:
    assert embedding_table(nn.Linear(2, 2)) is None

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    assert embedding_table(Named()) is not None
