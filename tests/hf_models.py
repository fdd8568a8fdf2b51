"""Small random Hugging Face models, their attention modules, and padded forward calls of these modules."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

D, HEADS, LAYERS, POSITIONS, WORDS = 24, 3, 2, 40, 30

COMMON: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 20,
}
TEXT: dict[str, Any] = {"vocab_size": WORDS, "max_position_embeddings": POSITIONS}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}


def _named(config: str, model: str, **options: Any) -> Callable[..., nn.Module]:
    def build(**changes: Any) -> nn.Module:
        import transformers

        chosen = getattr(transformers, config)(**(options | changes))
        return randomised(getattr(transformers, model)(chosen))

    return build


def randomised(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode with weights and biases far from their initial near-zero values."""
    model = model.to(torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


GPT2 = {"n_embd": D, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": WORDS, "n_positions": POSITIONS}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
DISTIL = {"dim": D, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": 20} | TEXT
ROBERTA = COMMON | TEXT | {"max_position_embeddings": POSITIONS + 2}

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "bert": _named("BertConfig", "BertModel", **COMMON, **TEXT),
    "roberta": _named("RobertaConfig", "RobertaModel", **ROBERTA),
    "xlm-roberta": _named("XLMRobertaConfig", "XLMRobertaModel", **ROBERTA),
    "camembert": _named("CamembertConfig", "CamembertModel", **ROBERTA),
    "electra": _named("ElectraConfig", "ElectraModel", **COMMON, **TEXT, embedding_size=D),
    "distilbert": _named("DistilBertConfig", "DistilBertModel", **DISTIL),
    "gpt2": _named("GPT2Config", "GPT2Model", **GPT2),
    "vit": _named("ViTConfig", "ViTModel", **COMMON, **IMAGE),
    "deit": _named("DeiTConfig", "DeiTModel", **COMMON, **IMAGE),
}
"""One small model of every family that is read; keyword arguments change its configuration."""

LAYER = {"distilbert": "transformer.layer.1.attention", "gpt2": "h.1.attn"} | dict.fromkeys(
    ("vit", "deit"), "layers.1.attention"
)
"""Path of the second attention layer; BERT's elsewhere."""

OTHERS: Mapping[str, Callable[..., nn.Module]] = {
    "t5": _named("T5Config", "T5Model", d_model=D, d_kv=8, num_heads=HEADS, num_layers=1, d_ff=20, vocab_size=WORDS),
    "llama": _named(
        "LlamaConfig", "LlamaModel", **COMMON, **TEXT, num_key_value_heads=1, bos_token_id=0, eos_token_id=0
    ),
    "mpnet": _named("MPNetConfig", "MPNetModel", **ROBERTA),
    "siglip": _named("SiglipVisionConfig", "SiglipVisionModel", **COMMON, **IMAGE),
    "bloom": _named("BloomConfig", "BloomModel", hidden_size=D, n_head=HEADS, n_layer=1, vocab_size=WORDS),
    "falcon": _named(
        "FalconConfig", "FalconModel", hidden_size=D, num_attention_heads=HEADS, num_hidden_layers=1, vocab_size=WORDS
    ),
    "mpt": _named("MptConfig", "MptModel", d_model=D, n_heads=HEADS, n_layers=1, vocab_size=WORDS),
    "mixtral": _named(
        "MixtralConfig",
        "MixtralModel",
        **COMMON,
        **TEXT,
        num_key_value_heads=1,
        num_local_experts=2,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "bert decoder": _named("BertConfig", "BertModel", **COMMON, **TEXT, is_decoder=True, add_cross_attention=True),
}
"""Models with attention that is not read, at least in part."""


def second_layer(family: str, model: nn.Module) -> nn.Module:
    """The second attention module of a family (BERT-style: without output projection)."""
    return model.get_submodule(LAYER.get(family, "encoder.layer.1.attention.self"))


def call(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output of a Hugging Face attention module on tokens (n, d), with an additive mask (n, n)."""
    with torch.no_grad():
        output = module(x[None], attention_mask=None if mask is None else mask[None, None])
    tokens = output[0] if isinstance(output, tuple) else output
    assert isinstance(tokens, Tensor)
    return tokens[0]


def model_inputs(family: str, n: int = 9) -> dict[str, Tensor]:
    """Keyword arguments of one forward call."""
    generator = torch.Generator().manual_seed(2)
    if family in ("vit", "deit"):
        return {"pixel_values": torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, WORDS, (1, n), generator=generator)}
