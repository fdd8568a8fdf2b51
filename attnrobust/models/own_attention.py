"""Hugging Face attention modules that compute their scores themselves instead of through the attention interface."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Rotary
from attnrobust.models.adapters import (
    LINEAR,
    Adapter,
    Call,
    class_path,
    dropout_reasons,
    foreign_reasons,
    linear_reasons,
    linear_weights,
    refuse,
    split_output_heads,
)
from attnrobust.models.biases import alibi_bias, mpnet_bias
from attnrobust.models.interface.positions import rotary_source
from attnrobust.models.unmodelled import unmodelled_features

_MODELS = "transformers.models"
_LINEARS = (LINEAR, f"{_MODELS}.falcon.modeling_falcon.FalconLinear")

Maps = Float[Tensor, "_ width columns"]
Split = Callable[[nn.Module, Tensor], tuple[Maps, Maps, Maps]]
"""Rows of a fused map (rows, columns) as those of queries, keys and values, group by group."""


@dataclass(frozen=True)
class Own:
    """What differs between the families.

    Args:
        linears: Names of the query, key, value and output maps, or of a fused map and the output map.
        heads: Attribute with the number of heads.
        split: How a fused map is cut.
        dropouts: Dropout modules or probabilities.
        output: The submodule whose output is the layer's; "" for the module itself.
        causal: Query i sees keys j <= i only.
    """

    linears: tuple[str, ...]
    heads: str
    split: Split | None = None
    dropouts: tuple[str, ...] = ()
    output: str = ""
    causal: bool = True


def _by_head(module: nn.Module, rows: Tensor) -> tuple[Maps, Maps, Maps]:
    """Query, key and value of head 1, of head 2, ..."""
    heads: Any = module.num_heads
    query, key, value = rows.reshape(heads, 3, -1, rows.shape[1]).unbind(1)
    return query, key, value


def _by_kind(module: nn.Module, rows: Tensor) -> tuple[Maps, Maps, Maps]:
    """All queries, all keys, all values."""
    heads: Any = module.n_heads
    query, key, value = rows.reshape(3, heads, -1, rows.shape[1]).unbind(0)
    return query, key, value


def _by_group(module: Any, rows: Tensor) -> tuple[Maps, Maps, Maps]:
    """Falcon: the queries of a group, its key, its value; one group for multi-query attention."""
    if not module.new_decoder_architecture and not module.multi_query:
        return _by_head(module, rows)
    parts = rows.reshape(module.num_kv_heads, -1, module.head_dim, rows.shape[1])
    return parts[:, :-2].flatten(0, 1), parts[:, -2], parts[:, -1]


_SEPARATE = ("q_proj", "k_proj", "v_proj", "out_proj")
OWN: Mapping[str, Own] = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": Own(
        _SEPARATE, "num_heads", dropouts=("attn_dropout", "resid_dropout")
    ),
    f"{_MODELS}.gptj.modeling_gptj.GPTJAttention": Own(
        _SEPARATE, "num_attention_heads", dropouts=("attn_dropout", "resid_dropout")
    ),
    f"{_MODELS}.falcon.modeling_falcon.FalconAttention": Own(
        ("query_key_value", "dense"), "num_heads", _by_group, ("attention_dropout",)
    ),
    f"{_MODELS}.bloom.modeling_bloom.BloomAttention": Own(
        ("query_key_value", "dense"), "num_heads", _by_head, ("attention_dropout",), "dense"
    ),
    f"{_MODELS}.mpt.modeling_mpt.MptAttention": Own(("Wqkv", "out_proj"), "n_heads", _by_kind, ("attn_dropout_p",)),
    f"{_MODELS}.mpnet.modeling_mpnet.MPNetSelfAttention": Own(
        ("q", "k", "v", "o"), "num_attention_heads", dropouts=("dropout",), causal=False
    ),
}
"""Every class that is read so."""


@dataclass(frozen=True)
class OwnAttentionAdapter(Adapter):
    """Adapter of the classes in ``OWN``.

    Args:
        model: The model around the module, which computes its positions; None for a module by itself.
    """

    model: nn.Module | None = None

    def within(self, model: nn.Module) -> "OwnAttentionAdapter":
        return replace(self, model=model)

    def reads(self, module: nn.Module) -> bool:
        return class_path(module) in OWN

    def kind(self, module: nn.Module) -> str:
        return f"{type(module).__name__}, with W_O"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        own = OWN[class_path(module)]
        yield from unmodelled_features(module)
        yield from dropout_reasons(module, own.dropouts)
        for name in own.linears:
            yield from linear_reasons(module, name, classes=_LINEARS)
        yield from foreign_reasons(module, own.linears)
        if getattr(module, "slow_but_exact", False) and getattr(module, "pretraining_tp", 1) > 1:
            yield "its output map is applied in slices (slow_but_exact); set it to False"

    def read(self, module: nn.Module) -> Attention:
        own = OWN[class_path(module)]
        heads = int(getattr(module, own.heads))
        parts = _fused(module, own) if own.split is not None else _separate(module, own, heads)
        (w_q, b_q), (w_k, b_k), (w_v, b_v) = (_repeated(weight, bias, heads) for weight, bias in parts)
        weight, b_o = linear_weights(module, own.linears[-1])
        groups = parts[1][0].shape[0]
        return Attention(
            w_q=w_q, w_k=w_k, w_v=w_v, b_q=b_q, b_k=b_k, b_v=b_v, w_o=split_output_heads(module, weight, heads),
            b_o=b_o, scale=_scale(module), causal=own.causal, rotary=self._rotary(module),
            head_bias=self._bias(module, heads), window_left=_window_left(module),
            kv_heads=groups if groups < heads else None,
        )  # fmt: skip

    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        n, name = tokens.shape[0], type(module).__name__
        plain = replace(spec, head_bias=None) if name in ("BloomAttention", "MptAttention") else spec
        bias = plain.score_bias(n)
        mask = None if bias is None else bias.expand(1, spec.heads, n, n)
        given: dict[str, Any] = {"attention_mask": mask}
        if name == "BloomAttention":
            assert spec.head_bias is not None  # noqa: S101 - read() gave it
            alibi = spec.head_bias.matrix(n)
            given |= {"residual": torch.zeros_like(tokens)[None], "alibi": alibi}
        elif name == "MptAttention":
            assert spec.head_bias is not None  # noqa: S101 - read() gave it
            given |= {"position_bias": spec.head_bias.matrix(n), "attention_mask": None if mask is None else mask < 0}
        elif name == "FalconAttention":
            given |= {"alibi": None if spec.head_bias is None else spec.head_bias.matrix(n)}
            if spec.rotary is not None:
                given["position_embeddings"] = rotary_source(self._root(module), module).tables(n)
        elif name == "GPTJAttention":
            given["position_ids"] = torch.arange(n, device=tokens.device)[None]
        return (tokens[None],), given

    def output_module(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(OWN[class_path(module)].output)

    def input_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise refuse(module, "was called without hidden_states")
        return hidden

    # ---- positions -------------------------------------------------------------------------------------------------

    def _root(self, module: nn.Module) -> nn.Module:
        return module if self.model is None else self.model

    def _rotary(self, module: nn.Module) -> Rotary | None:
        name: str = type(module).__name__
        if name == "GPTJAttention":
            return Rotary(frequencies=gptj_frequencies(module), layout="interleaved")
        if name == "FalconAttention" and not _has_alibi(module):
            return Rotary(frequencies=rotary_source(self._root(module), module).frequencies)
        return None

    def _bias(self, module: nn.Module, heads: int) -> HeadBias | None:
        name = type(module).__name__
        if name == "MPNetSelfAttention":
            return mpnet_bias(self._root(module), module)
        if name in ("BloomAttention", "MptAttention"):
            return alibi_bias(module, heads)
        if name == "FalconAttention" and _has_alibi(module):
            return alibi_bias(module, heads, factor=_scale(module))  # it is added before the scale
        return None


def _has_alibi(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "alibi", False))


def _scale(module: nn.Module) -> float:
    if type(module).__name__ == "GPTNeoSelfAttention":
        return 1.0
    found = getattr(module, "inv_norm_factor", getattr(module, "softmax_scale", None))
    if found is not None:
        return float(found)
    width: Any = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    return 1.0 / math.sqrt(width)


def _window_left(module: nn.Module) -> int | None:
    """GPT-Neo's local layers see the ``window_size`` last tokens."""
    config: Any = getattr(module, "config", None)
    return int(config.window_size) - 1 if getattr(module, "attention_type", None) == "local" else None


def gptj_frequencies(module: Any) -> Float[Tensor, "m"]:
    """GPT-J's angles per position; the module keeps only their sines and cosines, in float32."""
    planes = torch.arange(0, module.pos_embd_dim, 2, dtype=torch.int64)
    return torch.as_tensor(1.0 / (10000 ** (planes.to(torch.float64) / module.pos_embd_dim)), dtype=torch.float64)


def exact_positions(module: Any) -> None:
    """Replace GPT-J's tables of sines and cosines, rounded to float32, by the same in float64."""
    angles = torch.arange(module.max_positions, dtype=torch.float64)[:, None] * gptj_frequencies(module)
    table = torch.cat((angles.sin(), angles.cos()), dim=1)
    module.embed_positions = table.to(module.embed_positions.device)


# ---- projections -----------------------------------------------------------------------------------------------------

Projection = tuple[Float[Tensor, "_ width d"], Float[Tensor, "_ width"] | None]


def _fused(module: nn.Module, own: Own) -> tuple[Projection, Projection, Projection]:
    assert own.split is not None  # noqa: S101 - asked by the caller; narrows the type
    weight, bias = linear_weights(module, own.linears[0])
    weights = own.split(module, weight)
    biases = (None, None, None) if bias is None else tuple(part[..., 0] for part in own.split(module, bias[:, None]))
    query, key, value = zip(weights, biases, strict=True)
    return query, key, value


def _separate(module: nn.Module, own: Own, heads: int) -> tuple[Projection, Projection, Projection]:
    def cut(name: str) -> Projection:
        weight, bias = linear_weights(module, name)
        return weight.reshape(heads, -1, weight.shape[1]), None if bias is None else bias.reshape(heads, -1)

    query, key, value = own.linears[:3]
    return cut(query), cut(key), cut(value)


def _repeated(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """Maps (h, d, width), shared ones once for each of their heads."""
    times = heads // weight.shape[0]
    maps = weight.transpose(1, 2).repeat_interleave(times, 0).contiguous()
    return maps, None if bias is None else bias.repeat_interleave(times, 0).contiguous()
