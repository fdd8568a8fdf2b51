"""Small random layers of the other kinds of attention, with the certificate of each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnrobust.certify.closed_form.cosine_lipschitz import CosineLipschitz
from attnrobust.certify.closed_form.dasoulas2021_lipschitznorm import LipschitzNormGlobal
from attnrobust.certify.closed_form.kim2021_l2 import KimL2
from attnrobust.certify.closed_form.sigmoid_ball import SigmoidBall
from attnrobust.certify.method import CertificateMethod
from attnrobust.goals import Goal
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.threats.moves import MoveThreat
from attnrobust.tokens import TokenMeasure

Build = Callable[..., Any]


def _weights(seed: int, heads: int, width: int, *, projected: bool, shared: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"w_q": draw(heads, width, 3), "w_v": draw(heads, width, 2)}
    if not shared:
        found["w_k"] = draw(heads, width, 3)
    if projected:
        found["w_o"] = draw(heads, 2, 4)
    return found


def l2(seed: int, **more: Any) -> L2Attention:
    return L2Attention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=True), **more)


def cosine(seed: int, **more: Any) -> CosineAttention:
    options = {"tau": 1.5, "nu": 0.7, "eps": 0.1} | more
    return CosineAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **options)


def sigmoid(seed: int, **more: Any) -> SigmoidAttention:
    return SigmoidAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **({"shift": -0.4} | more))


def lipschitznorm(seed: int, **more: Any) -> LipschitzNormAttention:
    return LipschitzNormAttention(**_weights(seed, 2, 3, projected=seed % 2 == 0, shared=False), **more)


LAYERS: tuple[tuple[Build, CertificateMethod], ...] = (
    (l2, KimL2()),
    (cosine, CosineLipschitz()),
    (sigmoid, SigmoidBall()),
    (lipschitznorm, LipschitzNormGlobal()),
)


def variant_problem(layer: Any, points: Tensor, threat: MoveThreat, goal: Goal, mass: Tensor | None = None) -> Problem:
    return Problem(layer, TokenMeasure(points) if mass is None else TokenMeasure(points, mass), threat, goal)
