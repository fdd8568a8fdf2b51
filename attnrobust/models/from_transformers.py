"""Hugging Face attention modules as specifications; the only file that knows their layouts.

Classes are compared by their full dotted name, so transformers itself is not imported here. Because another version of
transformers may give the same name another meaning, every specification is checked against forward calls of its own
module before it is handed out (``Adapter.spec``).
"""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnrobust.layers.attention import Attention
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
    split_input_heads,
    split_output_heads,
)

_MODELS = "transformers.models"
_SCALE = "scaling"
_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Layout:
    """Where a module keeps its projections; ``output`` None means that the heads are concatenated.

    Args:
        query: Name of the query map (or of the fused query-key-value map).
        key: Name of the key map; "" if fused.
        value: Name of the value map; "" if fused.
        output: Name of the output projection or None.
        heads: Attribute with the number of heads.
        dropouts: Dropout modules or probabilities.
    """

    query: str
    key: str
    value: str
    output: str | None
    heads: str
    dropouts: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all projections."""
        return tuple(name for name in (self.query, self.key, self.value, self.output) if name)


_BERT = Layout("query", "key", "value", None, "num_attention_heads", ("dropout",))
_DISTILBERT = Layout("q_lin", "k_lin", "v_lin", "out_lin", "n_heads", ("dropout",))
_VIT = Layout("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", ("attention_dropout",))
_ALBERT = Layout("query", "key", "value", "dense", "num_attention_heads", ("attention_dropout", "output_dropout"))
_GPT2 = Layout("c_attn", "", "", "c_proj", "num_heads", ("attn_dropout", "resid_dropout"))

LAYOUTS: Mapping[str, Layout] = {
    f"{_MODELS}.bert.modeling_bert.BertSelfAttention": _BERT,
    f"{_MODELS}.roberta.modeling_roberta.RobertaSelfAttention": _BERT,
    f"{_MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": _BERT,
    f"{_MODELS}.camembert.modeling_camembert.CamembertSelfAttention": _BERT,
    f"{_MODELS}.electra.modeling_electra.ElectraSelfAttention": _BERT,
    f"{_MODELS}.distilbert.modeling_distilbert.DistilBertSelfAttention": _DISTILBERT,
    f"{_MODELS}.vit.modeling_vit.ViTAttention": _VIT,
    f"{_MODELS}.deit.modeling_deit.DeiTAttention": _VIT,
    f"{_MODELS}.gpt2.modeling_gpt2.GPT2Attention": _GPT2,
    f"{_MODELS}.albert.modeling_albert.AlbertAttention": _ALBERT,
}
"""Every attention module that is read, by class."""

BLOCKS: frozenset[str] = frozenset(
    path.replace("SelfAttention", "Attention") for path, layout in LAYOUTS.items() if layout is _BERT
)
"""BERT-style blocks: self-attention in ``self``, output projection in ``output.dense``, then residual and LayerNorm."""


def from_transformers(module: nn.Module) -> Attention:
    """Read a Hugging Face attention module in eval mode.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA: ``...SelfAttention`` concatenates its heads; ``...Attention`` is
    read as attention and its output projection ``output.dense``, WITHOUT the residual and the LayerNorm that follow.
    DistilBERT, ViT, DeiT and GPT-2 (causal) include their output projection; ALBERT's as BERT's ``...Attention``.

    Args:
        module: The attention module; it is read, not changed.

    Returns:
        The specification in float64; it owns copies of the weights.

    Raises:
        UnsupportedModelError: A class without an adapter (subclasses included), train mode with dropout, cross
            attention, relative positions, parameters that are not modelled, or another output of a forward call.
    """
    for adapter in HF_ADAPTERS:
        if adapter.reads(module):
            return adapter.spec(module)
    raise refuse(module, f"{class_path(module)} has no adapter")


class SelfAttentionAdapter(Adapter):
    """Adapter of the classes in ``LAYOUTS``."""

    def reads(self, module: nn.Module) -> bool:
        return class_path(module) in LAYOUTS

    def kind(self, module: nn.Module) -> str:
        layout = LAYOUTS[class_path(module)]
        ending = "heads concatenated" if layout.output is None else "with W_O"
        ending += ", without residual and LayerNorm" if layout is _ALBERT else ""
        return f"{type(module).__name__}, {ending}"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        layout = LAYOUTS[class_path(module)]
        yield from _unmodelled_reasons(module)
        yield from dropout_reasons(module, layout.dropouts)
        for name in layout.linears:
            yield from linear_reasons(module, name, classes=(LINEAR, _CONV1D))
        norms = ("LayerNorm.weight", "LayerNorm.bias") if layout is _ALBERT else ()
        yield from foreign_reasons(module, layout.linears, own=norms)

    def read(self, module: nn.Module) -> Attention:
        layout = LAYOUTS[class_path(module)]
        heads, scale = int(getattr(module, layout.heads)), float(getattr(module, _SCALE))
        parts = _fused_projections(module, layout) if layout is _GPT2 else _projections(module, layout)
        (w_q, b_q), (w_k, b_k), (w_v, b_v) = (split_input_heads(module, w, b, heads) for w, b in parts)
        w_o = b_o = None
        if layout.output is not None:
            weight, b_o = _linear(module, layout.output)
            w_o = split_output_heads(module, weight, heads)
        return Attention(
            w_q=w_q, w_k=w_k, w_v=w_v, b_q=b_q, b_k=b_k, b_v=b_v, w_o=w_o, b_o=b_o,
            scale=scale, causal=bool(getattr(module, "is_causal", False)),
        )  # fmt: skip

    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        return _hidden_states_call(spec, tokens)

    def output_module(self, module: nn.Module) -> nn.Module:
        return module.get_submodule("dense") if LAYOUTS[class_path(module)] is _ALBERT else module

    def input_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return _hidden_states(module, args, kwargs)


class BertBlockAdapter(Adapter):
    """Adapter of the classes in ``BLOCKS``: attention and output projection, without residual and LayerNorm."""

    def reads(self, module: nn.Module) -> bool:
        return class_path(module) in BLOCKS

    def kind(self, module: nn.Module) -> str:
        return f"{type(module).__name__}, with W_O, without residual and LayerNorm"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        attention = module.get_submodule("self")
        inner = SelfAttentionAdapter()
        if inner.reads(attention):
            yield from inner.reasons(attention)
        else:
            yield unmodelled_reason(attention)
        yield from linear_reasons(module, "output.dense")

    def read(self, module: nn.Module) -> Attention:
        base = SelfAttentionAdapter().read(module.get_submodule("self"))
        weight, b_o = linear_weights(module, "output.dense")
        return replace(base, w_o=split_output_heads(module, weight, base.heads), b_o=b_o)

    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        return _hidden_states_call(spec, tokens)

    def output_module(self, module: nn.Module) -> nn.Module:
        return module.get_submodule("output.dense")

    def input_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return _hidden_states(module, args, kwargs)


HF_ADAPTERS: tuple[Adapter, ...] = (SelfAttentionAdapter(), BertBlockAdapter())


# ---- what is not modelled --------------------------------------------------------------------------------------------


def unmodelled_reason(module: nn.Module) -> str:
    """Why an attention module has no specification, every reason that its class and attributes tell."""
    if parametrize.is_parametrized(module):
        return "is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    known = known_ancestor(module)
    if known is not None:
        return f"a subclass of {known} may compute something else; only the class itself is read"
    return "; ".join([*_positions(module), *_other_keys(module), f"no adapter for {class_path(module)}"])


def known_ancestor(module: nn.Module) -> str | None:
    """The attention class with an adapter of which the module's class is a proper subclass, if any."""
    ancestors = (f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__[1:])
    known = LAYOUTS.keys() | BLOCKS | {"torch.nn.modules.activation.MultiheadAttention"}
    return next((path.rsplit(".", 1)[1] for path in ancestors if path in known), None)


def _positions(module: nn.Module) -> Iterator[str]:
    """Positions inside the scores; a class may carry the settings of several kinds and use one."""
    config, arguments = getattr(module, "config", None), _arguments(module)
    alibi = getattr(config, "alibi", getattr(getattr(config, "attn_config", None), "alibi", "alibi" in arguments))
    alibi = alibi or ("position_bias" in arguments and _file_has_alibi(module))
    if alibi:
        yield "ALiBi position biases are not modelled"
    elif _has_relative_positions(module) or "position_bias" in arguments:
        yield "relative position biases are not modelled"
    rotary = any(getattr(config, name, None) is not None for name in _ROTARY)
    if not alibi and (rotary or any("rotary" in name for name, _ in module.named_modules())):
        yield "rotary position embeddings are not modelled"


def _file_has_alibi(module: nn.Module) -> bool:
    return any("alibi" in name for name in vars(sys.modules[type(module).__module__]))


_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim")


def _other_keys(module: nn.Module) -> Iterator[str]:
    """Keys and values that are not one per token and head."""
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        yield "cross attention (keys and values from another sequence) is not modelled"
    groups = getattr(module, "num_key_value_groups", 1)
    if isinstance(groups, int) and groups > 1:
        yield f"keys and values shared by {groups} query heads each are not modelled"
    if getattr(module, "sliding_window", None):
        yield f"a sliding window of {module.sliding_window} tokens is not modelled"


def _arguments(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(type(module).forward).parameters)


def _has_relative_positions(module: nn.Module) -> bool:
    names = [*vars(module), *(n for n, _ in module.named_modules()), *(n for n, _ in module.named_parameters())]
    return any("relative" in name or "distance_embedding" in name for name in names)


def _unmodelled_reasons(module: nn.Module) -> Iterator[str]:
    config = getattr(module, "config", None)
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        kind = {"alibi": "ALiBi position biases", "rotary": "rotary position embeddings"}.get(positions)
        yield f"position_embedding_type={positions!r}: {kind or 'relative position biases'} are not modelled"
    elif _has_relative_positions(module):
        yield "relative position biases are not modelled"
    if getattr(module, "is_cross_attention", False):
        yield "cross attention (keys and values from another sequence) is not modelled"
    if not isinstance(getattr(module, _SCALE, None), float | int):
        yield f"has no attribute {_SCALE!r}; this version of transformers is not supported (5.x is)"
    yield from _causality_reasons(module)


def _causality_reasons(module: nn.Module) -> Iterator[str]:
    causal = bool(getattr(module, "is_causal", False))
    wanted = getattr(getattr(module, "config", None), "is_causal", None)
    if wanted is not None and bool(wanted) != causal:
        yield f"config.is_causal={wanted} contradicts the module's is_causal={causal}"
    if getattr(module, "is_decoder", causal) != causal:
        yield f"is_decoder={module.is_decoder} contradicts is_causal={causal}"


# ---- layouts ---------------------------------------------------------------------------------------------------------

Projection = tuple[Float[Tensor, "out in"], Float[Tensor, "out"] | None]


def _linear(module: nn.Module, name: str) -> Projection:
    """A projection as ``x weight^T + bias``; Conv1D stores the transpose (in, out)."""
    weight, bias = linear_weights(module, name)
    return (weight.T if class_path(module.get_submodule(name)) == _CONV1D else weight), bias


def _projections(module: nn.Module, layout: Layout) -> tuple[Projection, Projection, Projection]:
    return _linear(module, layout.query), _linear(module, layout.key), _linear(module, layout.value)


def _fused_projections(module: nn.Module, layout: Layout) -> tuple[Projection, Projection, Projection]:
    weight, bias = _linear(module, layout.query)
    if weight.shape[0] % 3:
        raise refuse(module, f"{layout.query} has {weight.shape[0]} outputs, not query, key and value of one width")
    biases = (None, None, None) if bias is None else bias.chunk(3)
    query, key, value = zip(weight.chunk(3), biases, strict=True)
    return query, key, value


def _hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise refuse(module, "was called without hidden_states")
    if kwargs.get("encoder_hidden_states") is not None and getattr(module, "is_cross_attention", False):
        raise refuse(module, "is called as cross attention, which is not modelled")
    return hidden


def _hidden_states_call(spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
    hidden = torch.ones(tokens.shape[0], tokens.shape[0], dtype=torch.bool, device=tokens.device).triu(1)
    mask = tokens.new_zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None] if spec.causal else None
    return (tokens[None],), {"attention_mask": mask}
