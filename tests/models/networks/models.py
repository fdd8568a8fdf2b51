"""Small random models with heads, and torch encoders; their inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf_models import COMMON, DISTIL, GPT2, IMAGE, ROBERTA, TEXT, _named, model_inputs, randomised

CLASSES = {"num_labels": 3}
BERT = COMMON | TEXT
DECODER = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
DECODER |= {"intermediate_size": 20, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True} | TEXT
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
SMALL_ELECTRA = BERT | {"embedding_size": 10}

HEADS: Mapping[str, Callable[..., nn.Module]] = {
    "bert sequence": _named("BertConfig", "BertForSequenceClassification", **BERT, **CLASSES),
    "bert tokens": _named("BertConfig", "BertForTokenClassification", **BERT, **CLASSES),
    "bert words": _named("BertConfig", "BertForMaskedLM", **BERT),
    "roberta sequence": _named("RobertaConfig", "RobertaForSequenceClassification", **ROBERTA, **CLASSES),
    "roberta tokens": _named("RobertaConfig", "RobertaForTokenClassification", **ROBERTA, **CLASSES),
    "roberta words": _named("RobertaConfig", "RobertaForMaskedLM", **ROBERTA),
    "xlm sequence": _named("XLMRobertaConfig", "XLMRobertaForSequenceClassification", **ROBERTA, **CLASSES),
    "xlm words": _named("XLMRobertaConfig", "XLMRobertaForMaskedLM", **ROBERTA),
    "camembert sequence": _named("CamembertConfig", "CamembertForSequenceClassification", **ROBERTA, **CLASSES),
    "camembert words": _named("CamembertConfig", "CamembertForMaskedLM", **ROBERTA),
    "electra sequence": _named("ElectraConfig", "ElectraForSequenceClassification", **SMALL_ELECTRA, **CLASSES),
    "electra tokens": _named("ElectraConfig", "ElectraForTokenClassification", **SMALL_ELECTRA, **CLASSES),
    "electra words": _named("ElectraConfig", "ElectraForMaskedLM", **SMALL_ELECTRA),
    "albert sequence": _named("AlbertConfig", "AlbertForSequenceClassification", **SMALL_ELECTRA, **CLASSES),
    "albert tokens": _named("AlbertConfig", "AlbertForTokenClassification", **SMALL_ELECTRA, **CLASSES),
    "albert words": _named("AlbertConfig", "AlbertForMaskedLM", **SMALL_ELECTRA),
    "distilbert sequence": _named("DistilBertConfig", "DistilBertForSequenceClassification", **DISTIL, **CLASSES),
    "distilbert tokens": _named("DistilBertConfig", "DistilBertForTokenClassification", **DISTIL, **CLASSES),
    "distilbert words": _named("DistilBertConfig", "DistilBertForMaskedLM", **DISTIL),
    "gpt2 next word": _named("GPT2Config", "GPT2LMHeadModel", **GPT2),
    "gpt2 sequence": _named("GPT2Config", "GPT2ForSequenceClassification", **GPT2, **CLASSES),
    "gpt2 tokens": _named("GPT2Config", "GPT2ForTokenClassification", **GPT2, **CLASSES),
    "llama next word": _named("LlamaConfig", "LlamaForCausalLM", **DECODER),
    "llama sequence": _named("LlamaConfig", "LlamaForSequenceClassification", **DECODER, **CLASSES),
    "mistral next word": _named("MistralConfig", "MistralForCausalLM", **DECODER, sliding_window=4),
    "qwen2 next word": _named("Qwen2Config", "Qwen2ForCausalLM", **DECODER, **WINDOWS),
    "vit image": _named("ViTConfig", "ViTForImageClassification", **COMMON, **IMAGE, **CLASSES),
    "deit image": _named("DeiTConfig", "DeiTForImageClassification", **COMMON, **IMAGE, **CLASSES),
}
"""One small model of every head that is read."""


def encoder_layer(**changes: Any) -> nn.TransformerEncoderLayer:
    options: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True}
    return nn.TransformerEncoderLayer(**(options | changes))


def encoder(norm: nn.Module | None = None, **changes: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(**changes), 2, norm=norm, enable_nested_tensor=False)


TORCH: Mapping[str, Callable[[], nn.Module]] = {
    "post-norm layer": encoder_layer,
    "pre-norm layer": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "post-norm encoder": lambda: encoder(activation="gelu"),
    "pre-norm encoder": lambda: encoder(nn.LayerNorm(8), norm_first=True),
    "batch second": lambda: encoder(batch_first=False),
    "no biases": lambda: encoder(bias=False),
    "sequential": lambda: nn.Sequential(
        nn.Linear(5, 8),
        nn.Dropout(0.1),
        encoder_layer(),
        nn.SiLU(),
        encoder(norm_first=True, activation=nn.functional.gelu),
        nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)),
    ),
}


def torch_model(name: str) -> nn.Module:
    return randomised(TORCH[name]())


def torch_inputs(name: str) -> dict[str, Tensor]:
    x = torch.randn(1, 6, 5 if name == "sequential" else 8, dtype=torch.float64)
    if name == "sequential":
        return {"input": x}
    return {"src": x.transpose(0, 1) if name == "batch second" else x}


def inputs_of(name: str) -> dict[str, Tensor]:
    """One input of the model of that name in ``HEADS`` or ``tests.hf_models.MODELS``."""
    return model_inputs(name.split(maxsplit=1)[0])
