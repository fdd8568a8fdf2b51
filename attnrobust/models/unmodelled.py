"""Why an attention module has no specification: every part of its formula that is not modelled, by name."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from attnrobust.models.adapters import class_path

_NORM = re.compile(r"(q|k|qk|query|key)_?(norm|layernorm|ln|layer_norm)|norm_?(q|k|query|key)|(q|k)_?norm\d?")
_LATENT = frozenset({"kv_a_proj_with_mqa", "kv_b_proj", "kv_a_layernorm", "q_a_proj", "q_b_proj", "kv_down_proj"})
_GATES = frozenset({"gate_proj", "g_proj", "gate", "head_gate", "o_gate", "attn_gate"})


def unmodelled_reason(module: nn.Module, ancestor: str | None) -> str:
    """Everything that a module without adapter tells, joined.

    Args:
        module: The attention module.
        ancestor: The class with an adapter that it is a subclass of, if any.
    """
    if parametrize.is_parametrized(module):
        return "is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    if ancestor is not None:
        return f"a subclass of {ancestor} may compute something else; only the class itself is read"
    return "; ".join([*unmodelled_features(module), f"no adapter for {class_path(module)}"])


def unmodelled_features(module: nn.Module) -> Iterator[str]:
    """Parts of the formula that its attributes, parameters and configuration show and that no specification says."""
    children = {name for name, _ in module.named_children()}
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        yield "cross attention (keys and values from another sequence) is not modelled"
    if _has_disentangled(module):
        yield "disentangled position terms (DeBERTa) are not modelled"
    if any(_NORM.fullmatch(name) for name in children) or _is_set(module, "use_qk_norm", "qk_layernorm"):
        yield "a norm on queries and keys (qk-norm) is not modelled"
    if _is_set(module, "attn_logit_softcapping", "attn_softcap"):
        yield "a soft-cap on the scores is not modelled"
    if any("sink" in name for name in parameters):
        yield "attention sinks are not modelled"
    if children & _LATENT:
        yield "multi-head latent attention (MLA) is not modelled"
    if any(name.startswith("lambda_") for name in parameters):
        yield "differential attention is not modelled"
    if children & _GATES or _has_wide_queries(module):
        yield "an output gate is not modelled"
    if _clips(module):
        yield f"queries, keys and values are clamped (clip_qkv={_clips(module)}), which is not modelled"
    if _is_set(module, "attention_chunk_size"):
        yield "chunked attention is not modelled"
    if _is_set(module, "attn_temperature_tuning"):
        yield "a factor on the queries that grows with the position is not modelled"
    yield from _positions(module)


def _positions(module: nn.Module) -> Iterator[str]:
    """Positions that a checkpoint's own configuration asks for and that its class no longer computes, say."""
    kind = getattr(getattr(module, "config", None), "position_embedding_type", None) or "absolute"
    if kind in ("relative_key", "relative_key_query"):
        yield f"position_embedding_type={kind!r}: relative position biases are not modelled"
    elif any("distance_embedding" in name for name, _ in module.named_modules()):
        yield "relative position biases that depend on the query are not modelled"


def _is_set(module: nn.Module, *names: str) -> bool:
    owners = (module, getattr(module, "config", None))
    return any(bool(getattr(owner, name, None)) for owner in owners for name in names)


def _clips(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    own = getattr(module, "clip_qkv", None) or getattr(config, "clip_qkv", None)
    return own or getattr(getattr(config, "attn_config", None), "clip_qkv", None)


def _has_disentangled(module: nn.Module) -> bool:
    return "Disentangled" in type(module).__name__ or bool(getattr(module, "pos_att_type", None))


def _has_wide_queries(module: nn.Module) -> bool:
    """Queries of twice the width hold a gate for every output (Qwen3-Next)."""
    query, output = getattr(module, "q_proj", None), getattr(module, "o_proj", None)
    sizes = getattr(query, "out_features", None), getattr(output, "in_features", None)
    return None not in sizes and sizes[0] == 2 * int(sizes[1] or 0)
