"""Layers one after the other, with residual connections."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.features import features_of
from attnrobust.layers.token_map import TokenMap


@dataclass(frozen=True, eq=False)
class Residual:
    """``f(X) = X + inner(X)``.

    Args:
        inner: Any map with equal input and output width.

    Raises:
        InputError: The widths differ.
    """

    inner: TokenMap

    def __post_init__(self) -> None:
        if self.inner.width != self.inner.out_width:
            raise InputError(f"a residual needs equal widths; the inner map goes from {_widths(self.inner)}")

    @property
    def width(self) -> int:
        """Input token width d."""
        return self.inner.width

    @property
    def out_width(self) -> int:
        """Output token width, d as well."""
        return self.inner.out_width

    @property
    def features(self) -> frozenset[str]:
        """Those of the inner map."""
        return features_of(self.inner)

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n d"]:
        """Evaluate; ``mass`` None means equal masses."""
        return x + self.inner(x, mass)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the inner map."""
        return _digest("residual", (self.inner,))


@dataclass(frozen=True, eq=False)
class Network:
    """``f = last o ... o first``; the tokens keep their masses on the way.

    Args:
        layers: The maps in the order of evaluation, at least one.

    Raises:
        InputError: No layer, or neighbours whose widths differ.

    Examples:
        >>> import torch
        >>> from attnrobust.layers.normalisation import RMSNorm
        >>> norm = RMSNorm(weight=torch.ones(2))
        >>> block = Network((norm, Residual(norm)))
        >>> block.width, block.out_width
        (2, 2)
    """

    layers: tuple[TokenMap, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise InputError("a network needs at least one layer")
        for index, (first, second) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if first.out_width != second.width:
                raise InputError(f"layer {index} goes from {_widths(first)}, layer {index + 1} from {_widths(second)}")

    @property
    def width(self) -> int:
        """Input token width d of the first layer."""
        return self.layers[0].width

    @property
    def out_width(self) -> int:
        """Output token width e of the last layer."""
        return self.layers[-1].out_width

    @property
    def features(self) -> frozenset[str]:
        """Those of all layers."""
        return frozenset().union(*(features_of(layer) for layer in self.layers))

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        """Evaluate; ``mass`` None means equal masses."""
        for layer in self.layers:
            x = layer(x, mass)
        return x

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the layers in their order."""
        return _digest("network", self.layers)


def _digest(kind: str, layers: Sequence[TokenMap]) -> str:
    return hashlib.sha256(";".join((kind, *(layer.digest for layer in layers))).encode()).hexdigest()


def _widths(layer: TokenMap) -> str:
    return f"width {layer.width} to {layer.out_width}"
