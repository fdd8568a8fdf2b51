"""Layers and readouts of the recorded set, drawn from generators that are seeded by names."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

import attnrobust as ar


class Draw:
    """A stream of Gaussian float64 numbers that belongs to a name."""

    def __init__(self, name: str) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def mass(self, n: int) -> Tensor:
        return torch.softmax(self(n), dim=0)


def attention(
    draw: Draw,
    *,
    heads: int = 1,
    d: int = 4,
    k: int = 3,
    v: int = 3,
    out: int | None = 4,
    strength: float = 1.0,
    biases: bool = False,
    mask: Tensor | None = None,
    causal: bool = False,
) -> ar.Attention:
    """Dot-product attention whose scores have size about ``strength`` on tokens of unit variance."""
    into, after = strength**0.5 * d**-0.5, (heads * v) ** -0.5
    return ar.Attention(
        w_q=draw(heads, d, k, scale=into),
        w_k=draw(heads, d, k, scale=into),
        w_v=draw(heads, d, v, scale=d**-0.5),
        w_o=None if out is None else draw(heads, v, out, scale=after),
        b_q=draw(heads, k, scale=0.5) if biases else None,
        b_k=draw(heads, k, scale=0.5) if biases else None,
        b_v=draw(heads, v, scale=0.5) if biases else None,
        b_o=draw(out, scale=0.5) if biases and out is not None else None,
        mask=mask,
        causal=causal,
    )


def l2(draw: Draw, heads: int, d: int) -> ar.TokenMap:
    return ar.L2Attention(
        w_q=draw(heads, d, 2, scale=d**-0.5), w_v=draw(heads, d, 2, scale=d**-0.5), w_o=draw(heads, 2, 3), b_o=draw(3)
    )


def cosine(draw: Draw, heads: int, d: int) -> ar.TokenMap:
    return ar.CosineAttention(
        w_q=draw(heads, d, 2), w_k=draw(heads, d, 2), w_v=draw(heads, d, 2), tau=2.0, nu=0.5, eps=0.1
    )


def sigmoid(draw: Draw, heads: int, d: int) -> ar.TokenMap:
    return ar.SigmoidAttention(
        w_q=draw(heads, d, 2, scale=d**-0.5), w_k=draw(heads, d, 2, scale=d**-0.5), w_v=draw(heads, d, 3), shift=-0.5
    )


def lipschitznorm(draw: Draw, heads: int, d: int) -> ar.TokenMap:
    return ar.LipschitzNormAttention(
        w_q=draw(heads, d, 2), w_k=draw(heads, d, 2), w_v=draw(heads, d, 2), w_o=draw(heads, 2, 3)
    )


def gauss(x: Tensor, y: Tensor) -> Tensor:
    return -0.5 * (x[..., :, None, :] - y[..., None, :, :]).square().sum(dim=-1)


def kernel(draw: Draw, heads: int, d: int) -> ar.TokenMap:
    return ar.KernelAttention(gauss, "gauss", draw(d, heads + 1))


@dataclass(frozen=True, eq=False)
class Mixing:
    """A token map of a user's own: no certificate knows it, an attack needs no more."""

    weight: Tensor

    @property
    def width(self) -> int:
        return int(self.weight.shape[0])

    @property
    def out_width(self) -> int:
        return int(self.weight.shape[1])

    @cached_property
    def digest(self) -> str:
        return f"mixing;{self.weight.tolist()!r}"

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        mean = x.mean(dim=-2, keepdim=True) if mass is None else (mass[..., None] * x).sum(dim=-2, keepdim=True)
        return torch.tanh(x @ self.weight) * mean.square().sum(dim=-1, keepdim=True)


OTHERS: dict[str, Callable[[Draw, int, int], ar.TokenMap]] = {
    "l2": l2,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "lipschitznorm": lipschitznorm,
    "kernel": kernel,
}


def from_torch_module(draw: Draw) -> ar.TokenMap:
    """A layer of torch with drawn weights."""
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw(*parameter.shape, scale=0.4))
    layer: ar.TokenMap = ar.from_torch(module)
    return layer


def margin(layer: ar.TokenMap, name: str, *, classes: int = 3, pool: Literal["mean"] | int = "mean") -> ar.Margin:
    """A drawn linear readout; the label is the clean prediction."""
    draw = Draw("readout " + name)
    return ar.Margin(draw(classes, layer.out_width), bias=draw(classes, scale=0.1), pool=pool)
