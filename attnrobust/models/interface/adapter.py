"""The adapter of every class that is read at transformers' attention interface."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.models.adapters import (
    CONV1D,
    LINEAR,
    Adapter,
    Call,
    class_path,
    foreign_reasons,
    linear_reasons,
    refuse,
)
from attnrobust.models.biases import beit_bias, t5_bias
from attnrobust.models.checks.call_sites import ACROSS, is_called_with
from attnrobust.models.interface.families import FAMILIES, Family
from attnrobust.models.interface.looking import uses_interface
from attnrobust.models.interface.positions import Source, image_source, rotary_source
from attnrobust.models.interface.reading import Reader
from attnrobust.models.unmodelled import unmodelled_features

CROSS = ("key_value_states",)
"""Arguments that only calls for cross attention have in their source."""

OTHER_TOKENS = (*CROSS, "encoder_hidden_states")
"""Arguments that make a call cross attention."""


@dataclass(frozen=True)
class InterfaceAdapter(Adapter):
    """Adapter of the classes in ``FAMILIES``.

    Args:
        model: The model around the module, which computes its positions; None for a module by itself.
    """

    model: nn.Module | None = None

    def within(self, model: nn.Module) -> "InterfaceAdapter":
        return replace(self, model=model)

    def reads(self, module: nn.Module) -> bool:
        return class_path(module) in FAMILIES

    def kind(self, module: nn.Module) -> str:
        family = _family(module)
        behind = f", without residual and {', '.join(family.beside)}" if family.beside else ""
        return f"{type(module).__name__}, {'heads concatenated' if family.concatenated else 'with W_O'}{behind}"

    def reasons(self, module: nn.Module) -> Iterator[str]:
        if not uses_interface(module):
            yield "this version of transformers has no attention interface for it (5.x has)"
        if self._is_across(module):
            yield ACROSS
        yield from unmodelled_features(module)
        yield from _dropout_reasons(module)
        linears = [name for name, part in module.named_modules() if class_path(part) in (LINEAR, CONV1D)]
        for name in linears:
            yield from linear_reasons(module, name, classes=(LINEAR, CONV1D))
        known = (*_family(module).beside, *_family(module).positions)
        own = [name for name, _ in module.named_parameters() if name.split(".")[0] in known]
        yield from foreign_reasons(module, linears, own=own)

    def read(self, module: nn.Module) -> Attention:
        source, family = self._source(module), _family(module)
        reader = Reader(module, part=family.output, width=_width(module), source=source, arguments=self._extra(module))
        spec = reader.attention(causal=_is_causal(module))
        if (spec.w_o is None) != family.concatenated:
            raise refuse(module, "this version of transformers has another output map than the one that is known")
        bias = self._bias(module)
        return spec if bias is None else replace(spec, head_bias=bias)

    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        n, family = tokens.shape[0], _family(module)
        added = replace(spec, head_bias=None) if family.bias in ("t5", "own") else spec
        bias = added.score_bias(n)
        arguments = {**_required(module), family.mask: None if bias is None else bias.expand(1, spec.heads, n, n)}
        if family.bias == "t5" and spec.head_bias is not None:
            arguments["position_bias"] = spec.head_bias.matrix(n)[None]
        source = self._source(module)
        if source is not None:
            arguments["position_embeddings"] = source.tables(n)
        return (tokens[None],), arguments

    def output_module(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(_family(module).output)

    def input_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise refuse(module, "was called without hidden_states")
        if any(kwargs.get(name) is not None for name in OTHER_TOKENS):
            raise refuse(module, "is called as cross attention, which is not modelled")
        return hidden

    # ---- the module in its model -----------------------------------------------------------------------------------

    def _source(self, module: nn.Module) -> Source | None:
        if "position_embeddings" not in inspect.signature(type(module).forward).parameters or not _turns(module):
            return None
        find = image_source if _family(module).images else rotary_source
        return find(module if self.model is None else self.model, module)

    def _bias(self, module: nn.Module) -> HeadBias | None:
        """Position biases that the module is given."""
        readers = {"t5": t5_bias, "beit": beit_bias}
        read = readers.get(_family(module).bias)
        return None if read is None else read(module if self.model is None else self.model, module)

    def _extra(self, module: nn.Module) -> dict[str, Any]:
        """Arguments of the calls that look; T5 is given a bias, so that it makes none itself."""
        none = next(module.parameters()).new_zeros(1, 1, 1, 1, dtype=torch.float64)
        return _required(module) | ({"position_bias": none} if _family(module).bias == "t5" else {})

    def _is_across(self, module: nn.Module) -> bool:
        if getattr(module, "is_cross_attention", False):
            return True
        if self.model is None:
            return False
        name = next((name for name, part in self.model.named_modules() if part is module), "")
        return "crossattention" in name.split(".") or (
            bool(name) and is_called_with(self.model, name, OTHER_TOKENS[:1])
        )


def _family(module: nn.Module) -> Family:
    return FAMILIES[class_path(module)]


def _turns(module: nn.Module) -> bool:
    """Classes of several kinds of positions say which."""
    return getattr(module, "position_embedding_type", "rotary") == "rotary"


def _is_causal(module: nn.Module) -> bool:
    """CLIP has one class for images and texts, whose encoder alone makes the mask."""
    text = type(getattr(module, "config", None)).__name__ == "CLIPTextConfig"
    return text or bool(getattr(module, "is_causal", getattr(module, "is_decoder", False)))


def _width(module: nn.Module) -> int:
    """Token width: what the first linear map takes."""
    first = next(part for part in module.modules() if class_path(part) in (LINEAR, CONV1D))
    weight = dict(first.named_parameters())["weight"]
    return int(weight.shape[0 if class_path(first) == CONV1D else 1])


def _required(module: nn.Module) -> dict[str, Any]:
    """Arguments of a forward call that have no default, but are not needed here."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    empty = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]
    return dict.fromkeys(name for name in empty if name != "position_embeddings")


def _dropout_reasons(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            yield f"is in train mode with dropout {part.p:g} ({name}); call model.eval()"
