"""``torch.nn.MultiheadAttention`` as a specification."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.masks import additive_mask
from attnrobust.models.adapters import (
    LINEAR,
    Adapter,
    Call,
    computed_weight,
    dropout_reasons,
    foreign_reasons,
    linear_reasons,
    linear_weights,
    own_float64,
    refuse,
    split_input_heads,
    split_output_heads,
)

_OUT_CLASSES = ("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", LINEAR)


def from_torch(
    module: nn.MultiheadAttention,
    *,
    mask: Float[Tensor, "n n"] | Bool[Tensor, "n n"] | None = None,
    causal: bool = False,
) -> Attention:
    """Read a ``torch.nn.MultiheadAttention`` that is used as self-attention (query = key = value).

    ``f(X) = module(X, X, X)[0]`` in eval mode, with the output projection, in exact arithmetic. ``batch_first`` changes
    the layout of the module's tensors, not the function, so both are read; the specification always takes (n, d).

    Args:
        module: Exactly an ``nn.MultiheadAttention``; it is read, not changed, and may be trained on afterwards.
        mask: Score mask (n, n) as the module's ``attn_mask``: added if float, hidden where True if boolean. For its
            ``key_padding_mask`` use ``attnrobust.layers.masks.padding_mask``.
        causal: Query i sees keys j <= i only.

    Returns:
        The specification; it owns copies of the weights.

    Raises:
        UnsupportedModelError: A subclass, key or value width other than the embedding width (cross attention),
            ``bias_k``/``bias_v`` or ``add_zero_attn`` (an extra key that is no token), train mode with dropout.

    Examples:
        >>> import torch
        >>> layer = nn.MultiheadAttention(4, 2).eval()
        >>> spec = from_torch(layer)
        >>> x = torch.eye(3, 4)
        >>> bool((spec(x.double()) - layer(x, x, x)[0]).abs().max() < 1e-6)
        True
    """
    adapter = TorchAdapter()
    if not adapter.reads(module):
        if parametrize.is_parametrized(module):
            raise refuse(module, "is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
        raise UnsupportedModelError(
            f"{type(module).__name__} is not exactly torch.nn.MultiheadAttention; a subclass may compute something else"
        )
    if mask is not None and mask.dtype is torch.bool:
        mask = additive_mask(mask)
    return replace(adapter.spec(module), mask=mask, causal=causal)


class TorchAdapter(Adapter):
    """Adapter of ``torch.nn.MultiheadAttention``."""

    takes_query_key_value = True

    def reads(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def kind(self, module: nn.Module) -> str:
        return f"torch {type(module).__name__} with W_O"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        assert isinstance(module, nn.MultiheadAttention)  # noqa: S101 - reads(); narrows the type
        yield from _unmodelled_reasons(module)
        yield from linear_reasons(module, "out_proj", classes=_OUT_CLASSES)
        yield from foreign_reasons(module, ("out_proj",), own=(*_OWN, *_sources(module)))

    def read(self, module: nn.Module) -> Attention:
        assert isinstance(module, nn.MultiheadAttention)  # noqa: S101 - reads(); narrows the type
        heads = int(module.num_heads)
        weight = own_float64(module.in_proj_weight)
        bias = None if module.in_proj_bias is None else own_float64(module.in_proj_bias)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = [split_input_heads(module, w, b, heads) for w, b in zip(weight.chunk(3), biases, strict=True)]
        (w_q, b_q), (w_k, b_k), (w_v, b_v) = parts
        out, b_o = linear_weights(module, "out_proj")
        w_o = split_output_heads(module, out, heads)
        return Attention(w_q=w_q, w_k=w_k, w_v=w_v, b_q=b_q, b_k=b_k, b_v=b_v, w_o=w_o, b_o=b_o)

    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        batch = tokens[None] if getattr(module, "batch_first", False) else tokens[:, None]
        return (batch, batch, batch), {"need_weights": False}

    def input_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        names = ("query", "key", "value")
        query, key, value = (args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names))
        if query is not key or query is not value:
            raise refuse(module, "is called with a key or value that is not its query: cross attention is not modelled")
        if not isinstance(query, Tensor):
            raise refuse(module, "was called without a query")
        return self._batch_first(module, query)

    def output_tokens(self, module: nn.Module, output: Any) -> Tensor:
        return self._batch_first(module, super().output_tokens(module, output))

    @staticmethod
    def _batch_first(module: nn.Module, tokens: Tensor) -> Tensor:
        if tokens.ndim == 2:
            return tokens[None]
        return tokens if getattr(module, "batch_first", False) else tokens.transpose(0, 1)


_OWN = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
"""Parameters that are read, or refused by another name."""


def _sources(module: nn.MultiheadAttention) -> list[str]:
    """What a hook computes the input weights from; that hook is a reason of its own."""
    computed = not isinstance(module.in_proj_weight, nn.Parameter)
    return [f"in_proj_weight_{ending}" for ending in ("orig", "g", "v")] if computed else []


def _unmodelled_reasons(module: nn.MultiheadAttention) -> Iterator[str]:
    if not module._qkv_same_embed_dim:  # noqa: SLF001
        yield (
            f"key width {module.kdim} or value width {module.vdim} is not the embedding width {module.embed_dim}; "
            "it cannot be self-attention"
        )
    elif not isinstance(module.in_proj_weight, nn.Parameter):
        yield f"in_proj_weight {computed_weight(module)}"
    if module.bias_k is not None or module.bias_v is not None:
        yield "add_bias_kv=True appends a learned key that is no token; it is not modelled"
    if module.add_zero_attn:
        yield "add_zero_attn=True appends a zero key that is no token; it is not modelled"
    yield from dropout_reasons(module, ("dropout",))
