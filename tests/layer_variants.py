"""The other kinds of attention at one size, each with its slow formula."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from attnrobust.layers.heads import HeadSpecification
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from tests import slow_layers

H, D, K, V, E, N = 2, 5, 3, 4, 6, 6
Build = Callable[..., HeadSpecification]


def random(*shape: int, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def l2(**more: Any) -> L2Attention:
    return L2Attention(**({"w_q": random(H, D, K), "w_v": random(H, D, V)} | more))


def _dot(kind: type[HeadSpecification], **more: Any) -> Any:
    return kind(**({"w_q": random(H, D, K), "w_k": random(H, D, K), "w_v": random(H, D, V)} | more))


def cosine(**more: Any) -> CosineAttention:
    built: CosineAttention = _dot(CosineAttention, **({"tau": 1.7, "nu": 0.6, "eps": 0.05} | more))
    return built


def sigmoid(**more: Any) -> SigmoidAttention:
    built: SigmoidAttention = _dot(SigmoidAttention, **more)
    return built


def lipschitznorm(**more: Any) -> LipschitzNormAttention:
    built: LipschitzNormAttention = _dot(LipschitzNormAttention, **more)
    return built


LAYERS: dict[str, tuple[Build, Callable[..., Any]]] = {
    "l2": (l2, slow_layers.l2),
    "cosine": (cosine, slow_layers.cosine),
    "sigmoid": (sigmoid, slow_layers.sigmoid),
    "lipschitznorm": (lipschitznorm, slow_layers.lipschitznorm),
}


def slow(name: str, layer: HeadSpecification, x: Any, **more: Any) -> Any:
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}  # type: ignore[arg-type]
    arguments = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in values.items()}
    return LAYERS[name][1](x, **arguments, **more)
