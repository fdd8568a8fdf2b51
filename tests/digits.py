"""Small vision transformers, trained here on the handwritten digits that ship with scikit-learn."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

SIDE = 8
TRAINED = 1500
"""The first 1,500 of 1,797 images train; the rest are for questions."""


@dataclass(frozen=True)
class Recipe:
    """One vision transformer and its training.

    Args:
        blocks: Transformer blocks.
        patch: Side of a patch: 4 gives 4 patches, 2 gives 16, and the class token comes on top.
        activation: Of the MLPs.
        epochs: Passes over the images; 12 take about two seconds a block on one core.
        width: Token width.
        heads: Attention heads.
    """

    blocks: int = 1
    patch: int = 4
    activation: str = "gelu"
    epochs: int = 12
    width: int = 32
    heads: int = 4


SMALL = (Recipe(1, 4, "relu"), Recipe(1, 2, "gelu"), Recipe(2, 2, "gelu"))
"""The networks of the measured comparisons with other certifiers: one block with 4 and 16 patches, two with 16."""


def images() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, "1797"]]:
    """Every digit, its pixels scaled to [0, 1], and its class."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).reshape(-1, 1, SIDE, SIDE) / 16.0
    return pixels, torch.tensor(data.target)


@cache
def trained(recipe: Recipe) -> ViTForImageClassification:
    """A trained model in eval mode; the same seed gives the same start, batches and, up to rounding, weights."""
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = _untrained(recipe)
        _train(model, recipe.epochs)
    finally:
        torch.random.set_rng_state(state)
    model.train(mode=False)
    return model


def accuracy(model: ViTForImageClassification) -> float:
    """Share of the images that were not trained on and are classified right."""
    pixels, classes = images()
    with torch.no_grad():
        found = model(pixel_values=pixels[TRAINED:]).logits.argmax(-1)
    return float((found == classes[TRAINED:]).double().mean())


def _untrained(recipe: Recipe) -> ViTForImageClassification:
    options: dict[str, Any] = {
        "hidden_size": recipe.width, "num_hidden_layers": recipe.blocks, "num_attention_heads": recipe.heads,
        "intermediate_size": 2 * recipe.width, "hidden_act": recipe.activation, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "image_size": SIDE, "patch_size": recipe.patch, "num_channels": 1,
        "num_labels": 10, "attn_implementation": "sdpa",
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**options))


def _train(model: ViTForImageClassification, epochs: int) -> None:
    pixels, classes = images()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * (TRAINED // 50))
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED).split(50):
            loss = model(pixel_values=pixels[batch], labels=classes[batch]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps.step()
