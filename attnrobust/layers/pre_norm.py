"""Attention behind the normalisation of its block: the tokens are the hidden states of the residual stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import Specification
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.tokens import tensor_digest


@dataclass(frozen=True, eq=False)
class PreNormAttention(Specification):
    """``f(X) = attention(norm(X))``, or ``X + attention(norm(X))``: what a pre-norm block does to its hidden states.

    Args:
        norm: The normalisation in front of the attention.
        attention: The attention, whose tokens are the normalised ones.
        residual: Whether the tokens are added to the attention's output, as the block does.

    Raises:
        InputError: Other kinds of layers, widths that do not fit.
    """

    norm: LayerNorm | RMSNorm
    attention: Attention
    residual: bool = False

    feature_names: ClassVar[Mapping[str, str]] = {"norm": PLAIN, "attention": PLAIN, "residual": "residual"}

    def __post_init__(self) -> None:
        if type(self.norm) not in (LayerNorm, RMSNorm):
            raise InputError(f"the norm is a {type(self.norm).__name__}; give a LayerNorm or an RMSNorm")
        if type(self.attention) is not Attention:
            raise InputError(f"the attention is a {type(self.attention).__name__}; give an Attention")
        if self.norm.width != self.attention.width:
            raise InputError(f"the norm has width {self.norm.width}, the attention takes {self.attention.width}")
        if self.residual and self.attention.out_width != self.width:
            raise InputError(
                f"the tokens have width {self.width}, the attention's output {self.attention.out_width}; "
                "they cannot be added"
            )

    @property
    def width(self) -> int:
        return self.norm.width

    @property
    def out_width(self) -> int:
        return self.attention.out_width

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.attention.device

    @property
    def features(self) -> frozenset[str]:
        """Those of the attention and of the norm, and residual where the tokens are added."""
        return self.attention.features | self.norm.features | super().features

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        """Evaluate on hidden states; ``mass`` None means equal masses."""
        out = self.attention(self.norm(x), mass)
        return x + out if self.residual else out

    def rows(
        self, x: Float[Tensor, "*b n d"], at: Int[Tensor, "q"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b q e"]:
        """The rows ``at`` of the output alone, as ``Attention.rows``."""
        out = self.attention.rows(self.norm(x), at, mass)
        return x[..., at, :] + out if self.residual else out

    @cached_property
    def folded(self) -> Attention:
        """The attention with the norm's weight and bias in its own: it takes tokens of mean square 1 (``unit``)."""
        weight, bias, changes = self.norm.weight[:, None], self.norm.bias, dict[str, Any]()
        for name in ("q", "k", "v"):
            given, offset = getattr(self.attention, f"w_{name}"), getattr(self.attention, f"b_{name}")
            changes[f"w_{name}"] = weight * given
            if bias is not None:
                moved = (bias[:, None] * given).sum(dim=1)
                changes[f"b_{name}"] = moved if offset is None else offset + moved
        return replace(self.attention, **changes)

    def unit(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The normalised tokens before weight and bias: ``sqrt(d) z / |(z, sqrt(d eps))|``, z centred by LayerNorm."""
        return self.centred(x) * (math.sqrt(self.width) / self.length(x))[..., None]

    def centred(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """z: the tokens, less their mean for LayerNorm."""
        if isinstance(self.norm, RMSNorm):
            return x
        centred: Tensor = x - x.mean(dim=-1, keepdim=True)
        return centred

    def length(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n"]:
        """``|(z, sqrt(d eps))|``, by which the norm divides up to the factor ``sqrt(d)``."""
        squares: Tensor = self.centred(x).square().sum(dim=-1) + self.width * self.norm.eps
        return squares.sqrt()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over norm, attention and whether the tokens are added."""
        return tensor_digest(extra=f"pre-norm;{self.norm.digest};{self.attention.digest};{self.residual}")
