"""One small random model of every family whose attention is read at the interface or refused by name."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.hf_models import randomised

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
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
T5 = {"d_model": D, "d_kv": 6, "num_heads": HEADS, "num_layers": 2, "d_ff": 20, "vocab_size": WORDS}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0}


def _of(name: str, options: Mapping[str, Any], model: str = "Model", **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**options, **more})
        return randomised(getattr(transformers, f"{name}{model}")(config))

    return build


READ: Mapping[str, Callable[[], nn.Module]] = {
    "opt": _of("OPT", TEXT, ffn_dim=20, word_embed_proj_dim=D),
    "bart": _of("Bart", BART),
    "mbart": _of("MBart", BART),
    "marian": _of("Marian", BART),
    "pegasus": _of("Pegasus", BART),
    "whisper": _of(
        "Whisper", BART, num_mel_bins=5, max_source_positions=12, max_target_positions=POSITIONS, suppress_tokens=None
    ),
    "clip text": _of("CLIPText", TEXT),
    "clip vision": _of("CLIPVision", VISION),
    "siglip text": _of("SiglipText", TEXT),
    "siglip vision": _of("SiglipVision", VISION),
    "dinov2": _of("Dinov2", VISION),
    "wav2vec2": _of("Wav2Vec2", TEXT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2),
                    num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "hubert": _of("Hubert", TEXT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2),
                  num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "albert": _of("Albert", TEXT, embedding_size=D, num_hidden_groups=2),
    "gpt_bigcode": _of("GPTBigCode", TEXT, n_positions=POSITIONS, n_embd=D, n_head=HEADS, n_layer=2),
    "gpt_bigcode, own keys": _of("GPTBigCode", TEXT, n_positions=POSITIONS, n_embd=D, n_head=HEADS, n_layer=2, multi_query=False),
    "llama": _of("Llama", GROUPED),
    "llama, llama3 scaling": _of("Llama", GROUPED, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}),
    "llama, yarn": _of("Llama", GROUPED, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}),
    "mistral": _of("Mistral", GROUPED, sliding_window=5),
    "mixtral": _of("Mixtral", GROUPED, **EXPERTS),
    "qwen2": _of("Qwen2", GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2_moe": _of("Qwen2Moe", GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                     shared_expert_intermediate_size=8),
    "gemma": _of("Gemma", GROUPED, head_dim=8),
    "phi": _of("Phi", GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1/3}),
    "phi3": _of("Phi3", GROUPED, sliding_window=5),
    "gpt_neox": _of("GPTNeoX", TEXT, hidden_size=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    "olmo": _of("Olmo", GROUPED),
    "smollm3": _of("SmolLM3", GROUPED, no_rope_layers=[1, 0]),
    "granite": _of("Granite", GROUPED, attention_multiplier=0.3),
    "starcoder2": _of("Starcoder2", GROUPED, sliding_window=5),
    "stablelm": _of("StableLm", GROUPED, hidden_size=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    "cohere": _of("Cohere", GROUPED),
    "nemotron": _of("Nemotron", GROUPED, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "glm": _of("Glm", GROUPED, head_dim=8),
    "glm4": _of("Glm4", GROUPED, head_dim=8),
    "modernbert": _of("ModernBert", TEXT, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "nomic_bert": _of("NomicBert", TEXT),
    "esm": _of("Esm", TEXT, position_embedding_type="rotary", mask_token_id=3),
    "qwen2_vl text": _of("Qwen2VLText", GROUPED, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}),
    "t5": _of("T5", T5),
    "mt5": _of("MT5", T5),
    "beit": _of("Beit", VISION, use_relative_position_bias=True),
    "swin": _of("Swin", {"image_size": 16, "patch_size": 2, "num_channels": 1}, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4),
    "dinov3": _of("DINOv3ViT", VISION),
    "gpt_neo": _of("GPTNeo", TEXT, num_layers=2, num_heads=HEADS, attention_types=[[["global", "local"], 1]], window_size=5),
    "gptj": _of("GPTJ", TEXT, n_positions=POSITIONS, n_embd=32, n_head=HEADS, n_layer=2, rotary_dim=4),
    "falcon": _of("Falcon", TEXT, new_decoder_architecture=False, multi_query=True),
    "falcon, alibi": _of("Falcon", TEXT, alibi=True, multi_query=False, bias=True),
    "falcon, new": _of("Falcon", TEXT, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "bloom": _of("Bloom", TEXT, n_head=HEADS, n_layer=2),
    "mpt": _of("Mpt", {"d_model": D, "n_heads": HEADS, "n_layers": 2, "vocab_size": WORDS, "max_seq_len": POSITIONS}),
    "mpnet": _of("MPNet", TEXT),
}  # fmt: skip
"""Families that are read."""

REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "qwen3": (_of("Qwen3", GROUPED, head_dim=6), "norm on queries and keys"),
    "gemma2": (_of("Gemma2", GROUPED, head_dim=6), "soft-cap"),
    "gemma3": (_of("Gemma3Text", GROUPED, head_dim=6), "norm on queries and keys"),
    "olmo2": (_of("Olmo2", GROUPED), "norm on queries and keys"),
    "gpt_oss": (_of("GptOss", GROUPED, head_dim=6, **EXPERTS), "sinks"),
    "deberta": (_of("Deberta", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]), "disentangled"),
    "deberta_v2": (_of("DebertaV2", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]), "disentangled"),
    "deepseek_v3": (
        _of("DeepseekV3", TEXT, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=8,
            kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, num_key_value_heads=4),
        "latent attention",
    ),
    "llama4": (
        _of("Llama4Text", GROUPED, head_dim=6, **EXPERTS, intermediate_size_mlp=20, attention_chunk_size=8), "norm on queries"),
    "diffllama": (_of("DiffLlama", GROUPED), "differential"),
    "qwen3_next": (_of("Qwen3Next", GROUPED, head_dim=6, num_experts=2, num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"]), "gate"),
    "olmo, clip_qkv": (_of("Olmo", GROUPED, clip_qkv=1.0), "clamped"),
    "cohere, qk-norm": (_of("Cohere", GROUPED, use_qk_norm=True), "norm on queries"),
    "stablelm, qk-norm": (_of("StableLm", GROUPED, hidden_size=32, qk_layernorm=True), "norm on queries"),
}  # fmt: skip
"""Families that are refused, with a part of the reason."""
