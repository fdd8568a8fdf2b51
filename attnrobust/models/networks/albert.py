"""ALBERT: BERT's blocks under other names, one and the same module running as several of them; heads of its own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from attnrobust.models.adapters import class_path
from attnrobust.models.networks import heads
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import HIDDEN, HeadReader, activate, affine, choose_head, normalise
from attnrobust.models.networks.parts import require_class
from attnrobust.models.networks.plan import Head, Plan, Wanted

_FILE = "transformers.models.albert.modeling_albert"

LAYOUT = BlockLayout(
    attention="attention",
    norm_1="attention.LayerNorm",
    first="ffn",
    activation="activation",
    second="ffn_output",
    norm_2="full_layer_layer_norm",
    pre_norm=False,
    classes={"": (f"{_FILE}.AlbertLayer",)},
)


class AlbertReader:
    """Reads the classes of ``HEADS``."""

    def classes(self) -> tuple[str, ...]:
        return tuple(HEADS)

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        own = HEADS[class_path(model)]
        base = "" if own is None else "albert"
        require_class(model, base, f"{_FILE}.AlbertModel")
        blocks = LAYOUT.read_all(model, _passes(model, join(base, "encoder")))
        return Plan(type(model).__name__, blocks, choose_head(model, wanted, own, base=base, attribute=HIDDEN))


def _passes(model: nn.Module, encoder: str) -> tuple[str, ...]:
    """Paths of the layers in the order in which they run: pass i takes all layers of the group of i."""
    config: Any = require_class(model, encoder, f"{_FILE}.AlbertTransformer").config
    groups = entries(model, join(encoder, "albert_layer_groups"))
    for group in groups:
        require_class(model, group, f"{_FILE}.AlbertLayerGroup")
    passes, count = config.num_hidden_layers, config.num_hidden_groups
    chosen = (groups[int(i / (passes / count))] for i in range(passes))
    return tuple(layer for group in chosen for layer in entries(model, join(group, "albert_layers")))


def _sequence(model: nn.Module, row: int | None) -> Head:
    """Linear and tanh of the pooler on the first token, then the classifier."""
    pooler = (*affine(model, "albert.pooler"), *activate(model, "albert.pooler_activation"))
    return heads.classify_first(model, row, (*pooler, *affine(model, "classifier")))


def _words(model: nn.Module, row: int | None) -> Head:
    require_class(model, "predictions", f"{_FILE}.AlbertMLMHead")
    first = (*affine(model, "predictions.dense"), *activate(model, "predictions.activation"))
    rest = (*normalise(model, "predictions.LayerNorm"), *affine(model, "predictions.decoder"))
    return heads.masked_words(row, (*first, *rest))


HEADS: Mapping[str, HeadReader | None] = {
    f"{_FILE}.AlbertModel": None,
    f"{_FILE}.AlbertForSequenceClassification": _sequence,
    f"{_FILE}.AlbertForTokenClassification": heads.classify_tokens,
    f"{_FILE}.AlbertForMaskedLM": _words,
}
