"""DistilBERT: BERT's blocks under other names, and heads of its own."""

from collections.abc import Mapping

from torch import nn

from attnrobust.layers.graph.elementwise import Activate
from attnrobust.models.adapters import class_path
from attnrobust.models.networks import heads
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import HIDDEN, HeadReader, activate, affine, choose_head, normalise
from attnrobust.models.networks.parts import require_class
from attnrobust.models.networks.plan import Head, Plan, Wanted

_FILE = "transformers.models.distilbert.modeling_distilbert"

LAYOUT = BlockLayout(
    attention="attention",
    norm_1="sa_layer_norm",
    first="ffn.lin1",
    activation="ffn.activation",
    second="ffn.lin2",
    norm_2="output_layer_norm",
    pre_norm=False,
    classes={"": (f"{_FILE}.TransformerBlock",), "ffn": (f"{_FILE}.FFN",)},
)


class DistilBertReader:
    """Reads the classes of ``HEADS``."""

    def classes(self) -> tuple[str, ...]:
        return tuple(HEADS)

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        own = HEADS[class_path(model)]
        base = "" if own is None else "distilbert"
        require_class(model, base, f"{_FILE}.DistilBertModel")
        encoder = join(base, "transformer")
        require_class(model, encoder, f"{_FILE}.Transformer")
        blocks = LAYOUT.read_all(model, entries(model, join(encoder, "layer")))
        return Plan(type(model).__name__, blocks, choose_head(model, wanted, own, base=base, attribute=HIDDEN))


def _sequence(model: nn.Module, row: int | None) -> Head:
    """Linear, ReLU, linear on the first token."""
    first = (*affine(model, "pre_classifier"), ("pre_classifier.relu", Activate("relu")))
    return heads.classify_first(model, row, (*first, *affine(model, "classifier")))


def _words(model: nn.Module, row: int | None) -> Head:
    first = (*affine(model, "vocab_transform"), *activate(model, "activation"))
    return heads.masked_words(row, (*first, *normalise(model, "vocab_layer_norm"), *affine(model, "vocab_projector")))


HEADS: Mapping[str, HeadReader | None] = {
    f"{_FILE}.DistilBertModel": None,
    f"{_FILE}.DistilBertForSequenceClassification": _sequence,
    f"{_FILE}.DistilBertForTokenClassification": heads.classify_tokens,
    f"{_FILE}.DistilBertForMaskedLM": _words,
}
