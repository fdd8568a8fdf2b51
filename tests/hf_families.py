"""One small random model of every family whose attention is read at the interface or refused by name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf_models import randomised

PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
D, HEADS, WORDS, POSITIONS = 24, 4, 40, 256
TEXT: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": WORDS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
VISION: dict[str, Any] = {**{k: TEXT[k] for k in list(TEXT)[:4]}, **IMAGE}
BART: dict[str, Any] = {
    "d_model": D,
    "vocab_size": WORDS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
       (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", 20))},
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
T5 = {"d_model": D, "d_kv": 6, "num_heads": HEADS, "num_layers": 2, "d_ff": 20, "vocab_size": WORDS}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0}


def family(name: str, options: Mapping[str, Any], *, model: str = "Model", **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**options, **more})
        return randomised(getattr(transformers, f"{name}{model}")(config))

    return build


READ: Mapping[str, Callable[[], nn.Module]] = {
    "opt": family("OPT", TEXT, ffn_dim=20, word_embed_proj_dim=D),
    "bart": family("Bart", BART),
    "mbart": family("MBart", BART),
    "marian": family("Marian", BART),
    "pegasus": family("Pegasus", BART),
    "whisper": family(
        "Whisper", BART, num_mel_bins=5, max_source_positions=12, max_target_positions=POSITIONS, suppress_tokens=None
    ),
    "clip text": family("CLIPText", TEXT),
    "clip vision": family("CLIPVision", VISION),
    "siglip text": family("SiglipText", TEXT),
    "siglip vision": family("SiglipVision", VISION),
    "dinov2": family("Dinov2", VISION),
    "wav2vec2": family("Wav2Vec2", TEXT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2),
                    num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "hubert": family("Hubert", TEXT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2),
                  num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "albert": family("Albert", TEXT, embedding_size=D, num_hidden_groups=2),
    "gpt_bigcode": family("GPTBigCode", TEXT, n_positions=POSITIONS, n_embd=D, n_head=HEADS, n_layer=2),
    "gpt_bigcode, own keys": family("GPTBigCode", TEXT, n_positions=POSITIONS, n_embd=D, n_head=HEADS, n_layer=2,
                                    multi_query=False),
    "llama": family("Llama", GROUPED),
    "llama, llama3 scaling": family("Llama", GROUPED, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}),
    "llama, yarn": family("Llama", GROUPED, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}),
    "mistral": family("Mistral", GROUPED, sliding_window=5),
    "mixtral": family("Mixtral", GROUPED, **EXPERTS),
    "qwen2": family("Qwen2", GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2_moe": family("Qwen2Moe", GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                     shared_expert_intermediate_size=8),
    "qwen2_moe, window": family("Qwen2Moe", GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                                shared_expert_intermediate_size=8, use_sliding_window=True, sliding_window=5),
    "gemma": family("Gemma", GROUPED, head_dim=8),
    "phi": family("Phi", GROUPED, rope_parameters=PARTLY | {"partial_rotary_factor": 1 / 3}),
    "phi3": family("Phi3", GROUPED, sliding_window=5),
    "gpt_neox": family("GPTNeoX", TEXT, hidden_size=32, rope_parameters=PARTLY),
    "olmo": family("Olmo", GROUPED),
    "smollm3": family("SmolLM3", GROUPED, no_rope_layers=[1, 0]),
    "granite": family("Granite", GROUPED, attention_multiplier=0.3),
    "starcoder2": family("Starcoder2", GROUPED, sliding_window=5),
    "stablelm": family("StableLm", GROUPED, hidden_size=32, rope_parameters=PARTLY),
    "cohere": family("Cohere", GROUPED),
    "nemotron": family("Nemotron", GROUPED, head_dim=8, rope_parameters=PARTLY | {"partial_rotary_factor": 0.5}),
    "glm": family("Glm", GROUPED, head_dim=8),
    "glm4": family("Glm4", GROUPED, head_dim=8),
    "modernbert": family("ModernBert", TEXT, local_attention=6, global_attn_every_n_layers=2,
                         cls_token_id=1, sep_token_id=2),
    "nomic_bert": family("NomicBert", TEXT),
    "esm": family("Esm", TEXT, position_embedding_type="rotary", mask_token_id=3),
    "qwen2_vl text": family("Qwen2VLText", GROUPED, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}),
    "t5": family("T5", T5),
    "mt5": family("MT5", T5),
    "beit": family("Beit", VISION, use_relative_position_bias=True),
    "swin": family("Swin", {"image_size": 16, "patch_size": 2, "num_channels": 1},
                   embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4),
    "dinov3": family("DINOv3ViT", VISION, hidden_size=32, num_register_tokens=2),
    "gpt_neo": family("GPTNeo", TEXT, num_layers=2, num_heads=HEADS,
                      attention_types=[[["global", "local"], 1]], window_size=5),
    "gptj": family("GPTJ", TEXT, n_positions=POSITIONS, n_embd=32, n_head=HEADS, n_layer=2, rotary_dim=4),
    "falcon": family("Falcon", TEXT, new_decoder_architecture=False, multi_query=True),
    "falcon, alibi": family("Falcon", TEXT, alibi=True, multi_query=False, bias=True),
    "falcon, new": family("Falcon", TEXT, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "bloom": family("Bloom", TEXT, n_head=HEADS, n_layer=2),
    "mpt": family("Mpt", {"d_model": D, "n_heads": HEADS, "n_layers": 2, "vocab_size": WORDS,
                          "max_seq_len": POSITIONS}),
    "mpnet": family("MPNet", TEXT),
    "cohere2": family("Cohere2", GROUPED, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "ministral": family("Ministral", GROUPED, head_dim=6, sliding_window=5),
    "helium": family("Helium", GROUPED, head_dim=6),
    "arcee": family("Arcee", GROUPED),
    "seed_oss": family("SeedOss", GROUPED, head_dim=6),
    "ernie4_5": family("Ernie4_5", GROUPED, head_dim=6),
    "granitemoe": family("GraniteMoe", GROUPED, **EXPERTS),
    "modernbert_decoder": family("ModernBertDecoder", TEXT, local_attention=6, global_attn_every_n_layers=2,
                                 cls_token_id=1, sep_token_id=2),
    "biogpt": family("BioGpt", TEXT),
    "m2m_100": family("M2M100", BART),
    "blenderbot": family("Blenderbot", BART),
    "blenderbot_small": family("BlenderbotSmall", BART),
    "plbart": family("PLBart", BART),
    "unispeech": family("UniSpeech", TEXT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2),
                        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "vit_mae": family("ViTMAE", VISION),
    "dinov2_with_registers": family("Dinov2WithRegisters", VISION),
    "ernie": family("Ernie", TEXT),
    "data2vec_text": family("Data2VecText", TEXT),
    "roberta_prelayernorm": family("RobertaPreLayerNorm", TEXT),
}  # fmt: skip
"""Families that are read."""

REFUSED: Mapping[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "qwen3": (family("Qwen3", GROUPED, head_dim=6), ("norm on queries and keys",)),
    "gemma2": (family("Gemma2", GROUPED, head_dim=6), ("soft-cap",)),
    "gemma3": (family("Gemma3Text", GROUPED, head_dim=6), ("norm on queries and keys",)),
    "olmo2": (family("Olmo2", GROUPED), ("norm on queries and keys",)),
    "gpt_oss": (family("GptOss", GROUPED, head_dim=6, **EXPERTS), ("sinks",)),
    "deberta": (family("Deberta", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]), ("disentangled",)),
    "deberta_v2": (family("DebertaV2", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]), ("disentangled",)),
    "deepseek_v3": (
        family("DeepseekV3", TEXT, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1,
               moe_intermediate_size=8, kv_lora_rank=4, q_lora_rank=4,
               qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, num_key_value_heads=4),
        ("latent attention",),
    ),
    "llama4": (
        family("Llama4Text", GROUPED, head_dim=6, **EXPERTS, intermediate_size_mlp=20, attention_chunk_size=8),
        ("norm on queries", "chunked", "grows with the position",)),
    "diffllama": (family("DiffLlama", GROUPED), ("differential",)),
    "qwen3_next": (family("Qwen3Next", GROUPED, head_dim=6, num_experts=2, num_experts_per_tok=1,
                          layer_types=["linear_attention", "full_attention"]), ("gate", "norm on queries",)),
    "olmo, clip_qkv": (family("Olmo", GROUPED, clip_qkv=1.0), ("clamped",)),
    "cohere, qk-norm": (family("Cohere", GROUPED, use_qk_norm=True), ("norm on queries",)),
    "stablelm, qk-norm": (family("StableLm", GROUPED, hidden_size=32, qk_layernorm=True), ("norm on queries",)),
}  # fmt: skip
"""Families that are refused, with parts of the reason."""


def forward_inputs(model: Any, n: int) -> dict[str, Tensor]:
    """Keyword arguments of one forward call; ``n`` is the number of tokens where the model does not fix it."""
    generator = torch.Generator().manual_seed(n)
    config, main = model.config, str(model.main_input_name)
    ids = torch.randint(4, WORDS, (1, n), generator=generator)
    if main == "pixel_values":
        size = config.image_size
        image = torch.randn(1, config.num_channels, size, size, generator=generator, dtype=torch.float64)
        return {main: image}
    given = {"input_ids": ids}
    if main == "input_features":
        given = {main: torch.randn(1, config.num_mel_bins, 24, generator=generator, dtype=torch.float64)}
    elif main == "input_values":
        return {main: torch.randn(1, 4 * n + 10, generator=generator, dtype=torch.float64)}
    return given | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
