"""Rotary positions of a layer inside its model: the tables that the model computes and the frequencies behind them."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attnrobust.errors import InputError
from attnrobust.layers.rotary import Layout, Rotary
from attnrobust.models.adapters import refuse
from attnrobust.models.biases import owners
from attnrobust.models.checks.agreement import call_in_float64, float64_twin

EXACT = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary positions whose frequencies do not depend on the number of tokens."""

Tables = tuple[Tensor, Tensor]
"""Cosines and sines as a model hands them to its layers."""


class Source(ABC):
    """What makes the tables of one layer."""

    length: int | None = None
    """The number of tokens where it is fixed."""
    factor: float = 1.0
    """What cosines and sines are multiplied by (YaRN)."""

    @abstractmethod
    def tables(self, n: int) -> Tables:
        """Cosines and sines of n tokens from position 0 on, from the model's own code in float64."""

    def unturned(self, n: int) -> Tables:
        """Tables of the same shape whose every angle is 0."""
        cosines, sines = self.tables(n)
        return torch.ones_like(cosines), torch.zeros_like(sines)

    @abstractmethod
    def rotary(self, layout: Layout) -> Rotary:
        """The positions behind the tables."""


@dataclass(frozen=True, eq=False)
class RotarySource(Source):
    """The module of a model that makes the tables of one layer from positions in a sequence.

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
    def factor(self) -> float:  # type: ignore[override]
        return float(getattr(self.module, f"{self._prefix}attention_scaling", 1.0))

    @property
    def kind(self) -> str:
        """Its kind, such as "default" or "yarn"."""
        kind = getattr(self.module, "rope_type", "default")
        return str(kind.get(self.layer_type, "default") if isinstance(kind, dict) else kind)

    def rotary(self, layout: Layout) -> Rotary:
        return Rotary(frequencies=self.frequencies, layout=layout)

    def tables(self, n: int) -> Tables:
        like = self.frequencies
        positions = torch.arange(n, device=like.device)[None]
        args: tuple[Any, ...] = (like.new_zeros(1, n, 1), positions)
        if self.layer_type is not None:
            args = (*args, self.layer_type)
        cosines, sines = call_in_float64(float64_twin(self.module), args, {})
        return cosines, sines


@dataclass(frozen=True, eq=False)
class ImageSource(Source):
    """The module that makes the tables of the patches of an image; tokens in front of them are not turned.

    The image is of the size that the configuration names, so the number of tokens is fixed.

    Args:
        module: It.
        size: Height and width of the image.
        before: Number of tokens in front of the patches (class and register tokens).
    """

    module: nn.Module
    size: tuple[int, int]
    before: int

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.before + int(self._tables[0].shape[-2])

    @cached_property
    def _tables(self) -> Tables:
        config: Any = self.module.config
        image = torch.zeros(1, config.num_channels, *self.size, dtype=torch.float64)
        like = next(self.module.buffers())
        cosines, sines = call_in_float64(float64_twin(self.module), (image.to(like.device),), {})
        return cosines, sines

    def tables(self, n: int) -> Tables:
        if n != self.length:
            raise InputError(f"the layer's rotary angles are for {self.length} tokens, the input has {n}")
        return self._tables

    def unturned(self, n: int) -> Tables:
        cosines, sines = (table[..., :1, :] for table in self._tables)
        return torch.ones_like(cosines), torch.zeros_like(sines)

    def rotary(self, layout: Layout) -> Rotary:
        cosines, sines = self._tables
        planes = cosines.shape[-1] // 2
        angles = torch.atan2(sines, cosines).reshape(-1, 2 * planes)
        angles = angles[:, :planes] if layout == "half" else angles[:, ::2]
        return Rotary(angles=torch.cat((angles.new_zeros(self.before, planes), angles)), layout=layout)


def rotary_source(model: nn.Module, module: nn.Module) -> RotarySource:
    """The rotary module nearest to a layer on the way to the root of its model.

    Raises:
        UnsupportedModelError: There is none, or one whose tables are not one angle a plane times the position.
    """
    found = _nearest(model, module)
    layer_type = _layer_type(module) if "layer_type" in inspect.signature(type(found).forward).parameters else None
    source = RotarySource(found, layer_type)
    if not hasattr(found, f"{source._prefix}inv_freq") or "position_ids" not in _arguments(found):  # noqa: SLF001
        raise refuse(module, "rotary positions of images (two a token) are not modelled")
    if source.kind not in EXACT:
        raise refuse(module, f"rotary frequencies of kind {source.kind!r} depend on the number of tokens; not modelled")
    return source


def image_source(model: nn.Module, module: nn.Module) -> ImageSource:
    """The same for images (DINOv3).

    Raises:
        UnsupportedModelError: There is none.
    """
    config: Any = module.config
    size = config.image_size
    pair = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return ImageSource(_nearest(model, module), pair, 1 + int(config.num_register_tokens))


def _nearest(model: nn.Module, module: nn.Module) -> nn.Module:
    found = next((part for owner in owners(model, module) for part in _rotary_children(owner)), None)
    if found is None:
        raise refuse(module, "takes rotary positions that its model computes; give the whole model, not the layer")
    return found


def _layer_type(module: nn.Module) -> str | None:
    own = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    return own or layer_type(module)


def layer_type(module: nn.Module) -> str | None:
    """What the configuration calls a layer, such as "sliding_attention"; None where it does not say."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return str(types[index]) if types and isinstance(index, int) else None


def _arguments(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(inspect.unwrap(type(module).forward)).parameters)


def _rotary_children(owner: nn.Module) -> Iterator[nn.Module]:
    for child in owner.children():
        if "Rotary" in type(child).__name__ or "RoPE" in type(child).__name__ or "Rope" in type(child).__name__:
            yield child
