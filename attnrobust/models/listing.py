"""Every attention layer of a model, supported or not, and how a name finds one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.models.adapters import Adapter, refuse
from attnrobust.models.checks.call_sites import ACROSS, is_called_across
from attnrobust.models.from_torch import TorchAdapter
from attnrobust.models.from_transformers import HF_ADAPTERS, known_ancestor
from attnrobust.models.unmodelled import unmodelled_reason

ADAPTERS: tuple[Adapter, ...] = (TorchAdapter(), *HF_ADAPTERS)
"""Every adapter; a module is read by the first one that is for exactly its class."""

MOST_CANDIDATES = 12
MOST_REASONS = 4


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer of a model.

    Args:
        name: Its path in the model.
        kind: Its class, and what the specification covers (with or without output projection).
        supported: Whether it has an exact specification.
        reason: Why not; empty if supported.
        heads: Number of heads; None (as the widths) if not supported.
        d: Token width.
        k: Query and key width of one head.
        v: Value width of one head.
        e: Output width.
        mask: "none", "causal", "fixed" (the layer's own (n, n) mask), or "unknown" if not supported.
    """

    name: str
    kind: str
    supported: bool
    reason: str = ""
    heads: int | None = None
    d: int | None = None
    k: int | None = None
    v: int | None = None
    e: int | None = None
    mask: Literal["none", "causal", "fixed", "unknown"] = "unknown"


def describe(name: str, kind: str, spec: Attention) -> LayerInfo:
    """The listing of a supported layer."""
    mask: Literal["none", "causal", "fixed"] = "causal" if spec.causal else "none"
    return LayerInfo(
        name=name,
        kind=kind,
        supported=True,
        heads=spec.heads,
        d=spec.width,
        k=spec.key_width,
        v=spec.value_width,
        e=spec.out_width,
        mask="fixed" if spec.mask is not None else mask,
    )


def adapter_for(module: nn.Module, model: nn.Module | None = None) -> Adapter | None:
    """The adapter of exactly this class, or None.

    Args:
        module: The attention module.
        model: The model that it belongs to; some layers take their positions from it.
    """
    found = next((adapter for adapter in ADAPTERS if adapter.reads(module)), None)
    return found if found is None or model is None else found.within(model)


def list_layers(model: nn.Module) -> tuple[LayerInfo, ...]:
    """List every attention layer of a model in the order of its modules, the unsupported ones with the reason.

    A module counts as attention if an adapter is for its class or an ancestor of it, or if "Attention" is in its class
    name and in that of no module inside it. Nothing is changed: not the mode, not ``requires_grad``, not the weights.

    Args:
        model: Any module; a single attention module gives one layer with an empty name.

    Returns:
        One record per layer.
    """
    return tuple(_listed(model, name, module) for name, module in _attention_modules(model))


def find_layer(layers: Sequence[LayerInfo], name: str | None) -> LayerInfo:
    """The layer that a name means: the exact name, or a suffix of whole path parts that only one layer has.

    Args:
        layers: From ``list_layers``.
        name: The name; None means the only supported layer.

    Raises:
        UnknownNameError: No such layer; names the nearest.
        InputError: Several layers have the suffix, or None where there is not exactly one supported layer.
        UnsupportedModelError: The layer exists, but has no specification; gives the reason.
    """
    if not layers:
        raise InputError("the model has no attention layer that is recognised as one")
    found = _only_layer(layers) if name is None else _named_layer(layers, name)
    if not found.supported:
        raise UnsupportedModelError(f"layer {found.name!r} is not supported: {found.reason}")
    return found


def _named_layer(layers: Sequence[LayerInfo], name: str) -> LayerInfo:
    for layer in layers:
        if layer.name == name:
            return layer
    matches = [layer for layer in layers if layer.name.endswith(f".{name}")] if name else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"layer {name!r} is ambiguous; it may mean {_shortened([m.name for m in matches])}")
    raise UnknownNameError("layer", name, [layer.name for layer in layers])


def _only_layer(layers: Sequence[LayerInfo]) -> LayerInfo:
    supported = [layer for layer in layers if layer.supported]
    if not supported:
        first = {layer.reason: layer.name for layer in reversed(layers)}
        shown = [f"{name or 'the model'}: {reason}" for reason, name in list(first.items())[::-1][:MOST_REASONS]]
        raise UnsupportedModelError(f"no attention layer is supported; {'; '.join(shown)}")
    if len(supported) > 1:
        raise InputError(f"the model has {len(supported)} layers; name one: {_shortened([s.name for s in supported])}")
    return supported[0]


def _shortened(names: list[str]) -> str:
    more = len(names) - MOST_CANDIDATES
    return ", ".join(names[:MOST_CANDIDATES]) + (f" and {more} more" if more > 0 else "")


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if adapter_for(module) is not None or known_ancestor(module) is not None or _innermost_attention(module):
            yield name, module


def _innermost_attention(module: nn.Module) -> bool:
    def named_so(m: nn.Module) -> bool:
        return "Attention" in type(m).__name__

    return named_so(module) and not any(named_so(m) for m in module.modules() if m is not module)


def _listed(model: nn.Module, name: str, module: nn.Module) -> LayerInfo:
    adapter = adapter_for(module, model)
    if adapter is None:
        return LayerInfo(name=name, kind=type(module).__name__, supported=False, reason=_unmodelled(module))
    try:
        if name and adapter.takes_query_key_value and is_called_across(model, name):
            raise refuse(module, ACROSS)
        return describe(name, adapter.kind(module), adapter.spec(module))
    except InputError as error:
        return LayerInfo(name=name, kind=adapter.kind(module), supported=False, reason=str(error))


def _unmodelled(module: nn.Module) -> str:
    return unmodelled_reason(module, known_ancestor(module))
