"""BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA: post-norm encoders that differ in their heads (MiniLM is a BERT)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from attnrobust.layers.graph.elementwise import Activate
from attnrobust.models.adapters import class_path
from attnrobust.models.networks import heads
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import HIDDEN, HeadReader, activate, affine, choose_head, normalise
from attnrobust.models.networks.parts import require_class
from attnrobust.models.networks.plan import Head, Plan, Wanted

_MODELS = "transformers.models"


@dataclass(frozen=True)
class Variant:
    """One model family of BERT's layout.

    Args:
        prefix: Beginning of the full names of its classes.
        base: Attribute of the base model in models with a head.
        heads: Reader of each head, by the rest of the class's name.
    """

    prefix: str
    base: str
    heads: Mapping[str, HeadReader]

    @property
    def layout(self) -> BlockLayout:
        """The names inside of a block."""
        parts = {
            "": "Layer",
            "attention": "Attention",
            "attention.output": "SelfOutput",
            "intermediate": "Intermediate",
            "output": "Output",
        }
        return BlockLayout(
            attention="attention",
            norm_1="attention.output.LayerNorm",
            first="intermediate.dense",
            activation="intermediate.intermediate_act_fn",
            second="output.dense",
            norm_2="output.LayerNorm",
            pre_norm=False,
            classes={part: (self.prefix + name,) for part, name in parts.items()},
        )


class BertReader:
    """Reads every class of ``VARIANTS``."""

    def classes(self) -> tuple[str, ...]:
        return tuple(v.prefix + name for v in VARIANTS for name in ("Model", *v.heads))

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        path = class_path(model)
        variant = next(v for v in VARIANTS if path.startswith(v.prefix))
        own = variant.heads.get(path.removeprefix(variant.prefix))
        base = "" if own is None else variant.base
        require_class(model, base, f"{variant.prefix}Model")
        encoder = join(base, "encoder")
        require_class(model, encoder, f"{variant.prefix}Encoder")
        blocks = variant.layout.read_all(model, entries(model, join(encoder, "layer")))
        return Plan(type(model).__name__, blocks, choose_head(model, wanted, own, base=base, attribute=HIDDEN))


# ---- heads -----------------------------------------------------------------------------------------------------------


def _pooled_sequence(model: nn.Module, row: int | None) -> Head:
    """BERT: dense and tanh of the pooler, then the classifier."""
    require_class(model, "bert.pooler", f"{_BERT}Pooler")
    pooler = (*affine(model, "bert.pooler.dense"), *activate(model, "bert.pooler.activation"))
    return heads.classify_first(model, row, (*pooler, *affine(model, "classifier")))


def _dense_sequence(model: nn.Module, row: int | None) -> Head:
    """RoBERTa and its kin: dense, tanh, linear."""
    require_class(model, "classifier", *(f"{p}ClassificationHead" for p in (_ROBERTA, _XLM, _CAMEMBERT)))
    tanh = (("classifier.tanh", Activate("tanh")),)
    nodes = (*affine(model, "classifier.dense"), *tanh, *affine(model, "classifier.out_proj"))
    return heads.classify_first(model, row, nodes)


def _electra_sequence(model: nn.Module, row: int | None) -> Head:
    """ELECTRA: dense, GELU, linear."""
    require_class(model, "classifier", f"{_ELECTRA}ClassificationHead")
    first = (*affine(model, "classifier.dense"), *activate(model, "classifier.activation"))
    return heads.classify_first(model, row, (*first, *affine(model, "classifier.out_proj")))


def _bert_words(model: nn.Module, row: int | None) -> Head:
    require_class(model, "cls.predictions", f"{_BERT}LMPredictionHead")
    transform = "cls.predictions.transform"
    require_class(model, transform, f"{_BERT}PredictionHeadTransform")
    first = (*affine(model, f"{transform}.dense"), *activate(model, f"{transform}.transform_act_fn"))
    rest = (*normalise(model, f"{transform}.LayerNorm"), *affine(model, "cls.predictions.decoder"))
    return heads.masked_words(row, (*first, *rest))


def _roberta_words(model: nn.Module, row: int | None) -> Head:
    require_class(model, "lm_head", *(f"{p}LMHead" for p in (_ROBERTA, _XLM, _CAMEMBERT)))
    first = (*affine(model, "lm_head.dense"), ("lm_head.gelu", Activate("gelu")))
    rest = (*normalise(model, "lm_head.layer_norm"), *affine(model, "lm_head.decoder"))
    return heads.masked_words(row, (*first, *rest))


def _electra_words(model: nn.Module, row: int | None) -> Head:
    transform = "generator_predictions"
    require_class(model, transform, f"{_ELECTRA}GeneratorPredictions")
    first = (*affine(model, f"{transform}.dense"), *activate(model, f"{transform}.activation"))
    rest = (*normalise(model, f"{transform}.LayerNorm"), *affine(model, "generator_lm_head"))
    return heads.masked_words(row, (*first, *rest))


_BERT = f"{_MODELS}.bert.modeling_bert.Bert"
_ROBERTA = f"{_MODELS}.roberta.modeling_roberta.Roberta"
_XLM = f"{_MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRoberta"
_CAMEMBERT = f"{_MODELS}.camembert.modeling_camembert.Camembert"
_ELECTRA = f"{_MODELS}.electra.modeling_electra.Electra"


def _heads(sequence: HeadReader, words: HeadReader) -> Mapping[str, HeadReader]:
    return {
        "ForSequenceClassification": sequence,
        "ForTokenClassification": heads.classify_tokens,
        "ForMaskedLM": words,
    }


VARIANTS: tuple[Variant, ...] = (
    Variant(_BERT, "bert", _heads(_pooled_sequence, _bert_words)),
    *(Variant(p, "roberta", _heads(_dense_sequence, _roberta_words)) for p in (_ROBERTA, _XLM, _CAMEMBERT)),
    Variant(_ELECTRA, "electra", _heads(_electra_sequence, _electra_words)),
)
