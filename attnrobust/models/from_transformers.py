"""Hugging Face attention modules as specifications; the only file that knows their layouts.

Classes are compared by their full dotted name, so transformers itself is not imported here. Because another version of
transformers may give the same name another meaning, every specification is checked against forward calls of its own
module before it is handed out (``Adapter.spec``).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.attention import Attention
from attnrobust.models.adapters import (
    CONV1D,
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
from attnrobust.models.interface.adapter import InterfaceAdapter
from attnrobust.models.interface.families import FAMILIES
from attnrobust.models.own_attention import OWN, OwnAttentionAdapter
from attnrobust.models.unmodelled import unmodelled_reason

_MODELS = "transformers.models"
_SCALE = "scaling"


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
}
"""Every attention module that is read, by class."""

BLOCKS: frozenset[str] = frozenset(
    path.replace("SelfAttention", "Attention") for path, layout in LAYOUTS.items() if layout is _BERT
)
"""BERT-style blocks: self-attention in ``self``, output projection in ``output.dense``, then residual and LayerNorm."""


def from_transformers(module: nn.Module, *, model: nn.Module | None = None) -> Attention:
    """Read a Hugging Face attention module in eval mode.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA: ``...SelfAttention`` concatenates its heads; ``...Attention`` is
    read as attention and its output projection ``output.dense``, WITHOUT the residual and the LayerNorm that follow.
    DistilBERT, ViT, DeiT and GPT-2 (causal) include their output projection.

    Args:
        module: The attention module; it is read, not changed.
        model: The model that it is a part of; layers with rotary positions need it, since the model computes them.

    Returns:
        The specification in float64; it owns copies of the weights.

    Raises:
        UnsupportedModelError: A class without an adapter (subclasses included), train mode with dropout, cross
            attention, relative positions, parameters that are not modelled, or another output of a forward call.
    """
    for adapter in HF_ADAPTERS:
        if adapter.reads(module):
            return (adapter if model is None else adapter.within(model)).spec(module)
    raise refuse(module, unmodelled_reason(module, known_ancestor(module)))


class SelfAttentionAdapter(Adapter):
    """Adapter of the classes in ``LAYOUTS``."""

    def reads(self, module: nn.Module) -> bool:
        return class_path(module) in LAYOUTS

    def kind(self, module: nn.Module) -> str:
        ending = "heads concatenated" if LAYOUTS[class_path(module)].output is None else "with W_O"
        return f"{type(module).__name__}, {ending}"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        layout = LAYOUTS[class_path(module)]
        yield from _unmodelled_reasons(module)
        yield from dropout_reasons(module, layout.dropouts)
        for name in layout.linears:
            yield from linear_reasons(module, name, classes=(LINEAR, CONV1D))
        yield from foreign_reasons(module, layout.linears)

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
            yield unmodelled_reason(attention, known_ancestor(attention))
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


HF_ADAPTERS: tuple[Adapter, ...] = (
    SelfAttentionAdapter(),
    BertBlockAdapter(),
    InterfaceAdapter(),
    OwnAttentionAdapter(),
)


# ---- what is not modelled --------------------------------------------------------------------------------------------


def known_ancestor(module: nn.Module) -> str | None:
    """The attention class with an adapter of which the module's class is a proper subclass, if any."""
    ancestors = (f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__[1:])
    known = LAYOUTS.keys() | BLOCKS | FAMILIES.keys() | OWN.keys() | {"torch.nn.modules.activation.MultiheadAttention"}
    return next((path.rsplit(".", 1)[1] for path in ancestors if path in known), None)


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
    return (weight.T if class_path(module.get_submodule(name)) == CONV1D else weight), bias


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
