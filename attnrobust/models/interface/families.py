"""Which attention modules are read at the interface: each was compared with its own forward call in float64."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_MODELS = "transformers.models"


@dataclass(frozen=True)
class Family:
    """What the interface does not tell of a class of attention modules.

    Args:
        output: The submodule whose output is the layer's; "" for the module itself. What comes after it (a residual, a
            LayerNorm) is outside.
        beside: Submodules after the output.
        concatenated: The output map is in another module, so the heads are concatenated.
        mask: Name of the argument that takes the mask.
        bias: Who adds position biases to the scores: "" (nobody), "t5" (the first block of the stack, for all), "beit"
            (the block and the encoder, by the mask), or "own" (the module itself).
        positions: Submodules that hold position biases.
        images: Rotary positions are those of the patches of an image.
    """

    output: str = ""
    beside: tuple[str, ...] = ()
    concatenated: bool = False
    mask: str = "attention_mask"
    bias: Literal["", "t5", "beit", "own"] = ""
    positions: tuple[str, ...] = ()
    images: bool = False


_PLAIN = Family()


def _classes(family: Family, names: Mapping[str, str]) -> dict[str, Family]:
    return {f"{_MODELS}.{folder}.modeling_{folder}.{name}": family for folder, name in names.items()}


FAMILIES: Mapping[str, Family] = {
    **_classes(
        _PLAIN,
        {
            "opt": "OPTAttention",
            "bart": "BartAttention",
            "mbart": "MBartAttention",
            "marian": "MarianAttention",
            "pegasus": "PegasusAttention",
            "whisper": "WhisperAttention",
            "clip": "CLIPAttention",
            "siglip": "SiglipAttention",
            "dinov2": "Dinov2Attention",
            "wav2vec2": "Wav2Vec2Attention",
            "hubert": "HubertAttention",
            "gpt_bigcode": "GPTBigCodeAttention",
            "llama": "LlamaAttention",
            "mistral": "MistralAttention",
            "mixtral": "MixtralAttention",
            "qwen2": "Qwen2Attention",
            "qwen2_moe": "Qwen2MoeAttention",
            "gemma": "GemmaAttention",
            "phi": "PhiAttention",
            "phi3": "Phi3Attention",
            "gpt_neox": "GPTNeoXAttention",
            "olmo": "OlmoAttention",
            "smollm3": "SmolLM3Attention",
            "granite": "GraniteAttention",
            "starcoder2": "Starcoder2Attention",
            "stablelm": "StableLmAttention",
            "cohere": "CohereAttention",
            "nemotron": "NemotronAttention",
            "glm": "GlmAttention",
            "glm4": "Glm4Attention",
            "modernbert": "ModernBertAttention",
            "nomic_bert": "NomicBertAttention",
            "qwen2_vl": "Qwen2VLAttention",
            "cohere2": "Cohere2Attention",
            "ministral": "MinistralAttention",
            "helium": "HeliumAttention",
            "arcee": "ArceeAttention",
            "seed_oss": "SeedOssAttention",
            "ernie4_5": "Ernie4_5Attention",
            "granitemoe": "GraniteMoeAttention",
            "modernbert_decoder": "ModernBertDecoderAttention",
            "biogpt": "BioGptAttention",
            "m2m_100": "M2M100Attention",
            "blenderbot": "BlenderbotAttention",
            "blenderbot_small": "BlenderbotSmallAttention",
            "plbart": "PLBartAttention",
            "unispeech": "UniSpeechAttention",
            "vit_mae": "ViTMAEAttention",
            "dinov2_with_registers": "Dinov2WithRegistersAttention",
        },
    ),
    **_classes(
        Family(concatenated=True),
        {
            "esm": "EsmSelfAttention",
            "ernie": "ErnieSelfAttention",
            "roberta_prelayernorm": "RobertaPreLayerNormSelfAttention",
        },
    ),
    f"{_MODELS}.data2vec.modeling_data2vec_text.Data2VecTextSelfAttention": Family(concatenated=True),
    **_classes(Family(output="dense", beside=("LayerNorm",)), {"albert": "AlbertAttention"}),
    **_classes(
        Family(mask="mask", bias="t5", positions=("relative_attention_bias",)),
        {"t5": "T5Attention", "mt5": "MT5Attention"},
    ),
    **_classes(Family(images=True), {"dinov3_vit": "DINOv3ViTAttention"}),
    **_classes(Family(bias="beit"), {"beit": "BeitAttention"}),
    **_classes(Family(bias="own", positions=("relative_position_bias",)), {"swin": "SwinAttention"}),
}
"""Every class that is read at the interface."""
