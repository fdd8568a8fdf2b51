"""Rotary positions of a layer inside its model: the tables that the model computes and the frequencies behind them."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnrobust.models.adapters import refuse
from attnrobust.models.biases import owners
from attnrobust.models.checks.agreement import call_in_float64, float64_twin

EXACT = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary positions whose frequencies do not depend on the number of tokens."""

Tables = tuple[Tensor, Tensor]
"""Cosines and sines as a model hands them to its layers."""


@dataclass(frozen=True, eq=False)
class RotarySource:
    """The module of a model that makes the tables of one layer.

    Args:
        module: It.
        layer_type: Which of its kinds of tables the layer takes; None where there is one.
    """

    module: nn.Module
    layer_type: str | None

    @property
    def _prefix(self) -> str:
        return "" if self.layer_type is None else f"{self.layer_type}_"

    @property
    def frequencies(self) -> Tensor:
        """Angle per position of every plane, as the model stores them."""
        return torch.as_tensor(getattr(self.module, f"{self._prefix}inv_freq")).detach().to(torch.float64)

    @property
    def factor(self) -> float:
        """What cosines and sines are multiplied by (YaRN)."""
        return float(getattr(self.module, f"{self._prefix}attention_scaling", 1.0))

    @property
    def kind(self) -> str:
        """Its kind, such as "default" or "yarn"."""
        kind = getattr(self.module, "rope_type", "default")
        return str(kind.get(self.layer_type, "default") if isinstance(kind, dict) else kind)

    def tables(self, n: int) -> Tables:
        """Cosines and sines of n tokens from position 0 on, from the model's own code in float64."""
        like = self.frequencies
        positions = torch.arange(n, device=like.device)[None]
        args: tuple[Any, ...] = (like.new_zeros(1, n, 1), positions)
        if self.layer_type is not None:
            args = (*args, self.layer_type)
        cosines, sines = call_in_float64(float64_twin(self.module), args, {})
        return cosines, sines


def rotary_source(model: nn.Module, module: nn.Module) -> RotarySource:
    """The rotary module nearest to a layer on the way to the root of its model.

    Raises:
        UnsupportedModelError: There is none, or one whose tables are not one angle a plane times the position.
    """
    found = next((part for owner in owners(model, module) for part in _rotary_children(owner)), None)
    if found is None:
        raise refuse(module, "takes rotary positions that its model computes; give the whole model, not the layer")
    layer_type = _layer_type(module) if "layer_type" in inspect.signature(type(found).forward).parameters else None
    source = RotarySource(found, layer_type)
    if not hasattr(found, f"{source._prefix}inv_freq") or "position_ids" not in _arguments(found):  # noqa: SLF001
        raise refuse(module, "rotary positions of images (two a token) are not modelled")
    if source.kind not in EXACT:
        raise refuse(module, f"rotary frequencies of kind {source.kind!r} depend on the number of tokens; not modelled")
    return source


def _layer_type(module: nn.Module) -> str | None:
    own = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return own or (types[index] if types and isinstance(index, int) else None)


def _arguments(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(inspect.unwrap(type(module).forward)).parameters)


def _rotary_children(owner: nn.Module) -> Iterator[nn.Module]:
    for child in owner.children():
        if "Rotary" in type(child).__name__ or "RoPE" in type(child).__name__ or "Rope" in type(child).__name__:
            yield child
