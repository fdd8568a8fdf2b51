"""A sentence encoder as a classifier: the class is that of the nearest anchor sentence."""

from collections.abc import Sequence

import torch

from attnrobust.errors import InputError
from attnrobust.goals import Margin
from attnrobust.models.model import Model


def nearest_anchor_readout(model: Model, sentences: Sequence[str], *, label: int | None = None) -> Margin:
    """The goal "the nearest anchor stays", for a network with head "mean".

    ``logit_c = <a_c / |a_c|, mean_i z_i>`` with a_c the mean of the last hidden states at anchor c: the class of the
    largest cosine, since the length of the input's own mean divides all logits alike. The readout is linear in the
    mean, so margins of it are margins of the cosine rule.

    Args:
        model: A model with tokenizer that is read as a network.
        sentences: One anchor for each class, at least two.
        label: The class that must stay; None means the clean prediction.

    Raises:
        InputError: Fewer than two sentences, or two of one direction, between which nothing can decide.
    """
    if len(sentences) < 2:
        raise InputError(f"got {len(sentences)} anchor sentences; give at least two, one for each class")
    reads = [model.network(sentence, head="mean") for sentence in sentences]
    means = torch.cat([read.graph(read.input.measure.points) for read in reads])
    weight = torch.nn.functional.normalize(means, dim=1)
    same = (weight @ weight.T).fill_diagonal_(0.0) > 1.0 - 1e-12  # rounding of a cosine of equal vectors is ~1e-15
    if bool(same.any()):
        first, second = same.nonzero()[0].tolist()
        raise InputError(f"anchors {first} and {second} give the same direction; give sentences that differ")
    return Margin(weight, pool=0, label=label)
