"""Whole models as networks: the one call for names, modules and loaded models."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from attnrobust.models.capture import TextLine
from attnrobust.models.checks.forward_inputs import Given
from attnrobust.models.model import Model, ModuleModel, load_model
from attnrobust.models.networks.plan import EMBEDDINGS, HeadName
from attnrobust.models.networks.reading import ReadNetwork


def read_network(
    model: Model | nn.Module | str | Path,
    given: TextLine | str | Mapping[str, Given],
    *,
    at: str = EMBEDDINGS,
    head: HeadName | None = None,
    row: int | None = None,
    device: str | torch.device = "cpu",
) -> ReadNetwork:
    """Read a whole model as an exact network from one depth on, with the clean tokens there.

    ``graph(tokens)`` is the model's own output in float64: at the given input every hidden state on the way and the
    output itself are compared with the model's own forward pass, to 1e-10 of the terms.

    Args:
        model: A model, a module (taken in eval mode and float64, as a copy), or a name as in ``load_model``; a name is
            loaded with the head that its configuration names, unless ``head`` asks for hidden states.
        given: The clean input: a text (models with a tokenizer), or keyword arguments of one forward call on one input.
        at: The depth at which tokens move: "embeddings" (what enters block 0) or "block:K" (what enters block K).
        head: "logits" (the model's own head), "states" (last hidden states) or "mean" (their mean); None means its own
            head where it has one, else the states.
        row: The token whose output it is, where there is one per token; None means all (causal models: the last).
        device: Where a model loaded by name goes.

    Returns:
        The graph, the clean tokens at the depth, and what was read; ``decision()`` gives network and goal of "the label
        stays".

    Raises:
        UnsupportedModelError: The model, or a part of it by name, is not modelled; or its own states disagree.
        InputError: Nothing of that name can be loaded; an input, head or depth that does not exist.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
        >>> found = read_network(layer, {"src": torch.eye(3, 4)[None]})
        >>> found.info.depths, tuple(found.graph(found.input.measure.points).shape)
        (('embeddings',), (3, 4))
    """
    if isinstance(model, nn.Module):
        model = ModuleModel(model)
    elif not isinstance(model, Model):
        model = load_model(model, device=device, head=head in (None, "logits"))
    return model.network(given, at=at, head=head, row=row)
