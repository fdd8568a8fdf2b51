"""Small layers of every class, one threat and one goal of every kind: what the contracts are asked about."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrobust.certify import CertificateMethod
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import FeedForward, GraphBuilder, NetworkGraph
from attnrobust.layers.heads import Specification
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure

N, D = 3, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*names: str) -> dict[str, Any]:
    return {name: 0.7 * draw(1, D, D, seed=10 + i) for i, name in enumerate(names)}


def attention(kind: Callable[..., Attention] = Attention, **more: object) -> Attention:
    return kind(**weights("w_q", "w_k", "w_v"), **more)


LAYERS: dict[type, Callable[[], TokenMap]] = {
    Attention: attention,
    L2Attention: lambda: L2Attention(**weights("w_q", "w_v")),
    CosineAttention: lambda: CosineAttention(**weights("w_q", "w_k", "w_v"), eps=0.1),
    SigmoidAttention: lambda: SigmoidAttention(**weights("w_q", "w_k", "w_v")),
    LipschitzNormAttention: lambda: LipschitzNormAttention(**weights("w_q", "w_k", "w_v")),
    KernelAttention: lambda: KernelAttention(lambda x, y: -torch.cdist(x, y), "laplace", draw(D, D)),
    Mlp: lambda: Mlp(draw(D, 4), draw(4, D, seed=1)),
    LayerNorm: lambda: LayerNorm(torch.ones(D)),
    RMSNorm: lambda: RMSNorm(torch.ones(D)),
}


def graph() -> NetworkGraph:
    """One block with a gate and both kinds of norm."""
    builder = GraphBuilder(D)
    mlp = FeedForward(draw(D, 4), draw(4, D, seed=1), w_gate=draw(D, 4, seed=2), activation="silu")
    builder.post_norm_block(
        "block", attention=attention(), norm_1=LayerNorm(torch.ones(D)), mlp=mlp, norm_2=RMSNorm(torch.ones(D))
    )
    return builder.build()


NETWORKS: dict[type, Callable[[], TokenMap]] = {NetworkGraph: graph}
"""Networks: their features are those of their nodes, not of fields."""
THREATS: tuple[Threat, ...] = (
    AnyToken(),
    FrobeniusBall(),
    PerTokenBall(),
    CouplingBall(2, domain_radius=4.0),
    CouplingBall(math.inf),
    WassersteinBall(2, domain_radius=4.0),
    Copies(1),
)
GOALS: tuple[Goal, ...] = (Displacement(1.5, pool="mean"), Margin(torch.eye(D), pool="mean"))


@dataclass(frozen=True, eq=False)
class Rotary(Attention):
    """Queries and keys are rotated by angles that grow with the position, which no bound for ``Attention`` knows."""

    def queries(self, x: Tensor, *, at: Tensor | None = None) -> Tensor:
        rows = _rotated(super().queries(x))
        return rows if at is None else rows[..., at, :]

    def keys(self, x: Tensor) -> Tensor:
        return _rotated(super().keys(x))


def _rotated(rows: Tensor) -> Tensor:
    angle = 1.5 * torch.arange(rows.shape[-2], dtype=rows.dtype)
    first, second = rows[..., 0], rows[..., 1]
    return torch.stack([angle.cos() * first - angle.sin() * second, angle.sin() * first + angle.cos() * second], dim=-1)


@dataclass(frozen=True)
class Loose(FrobeniusBall):
    """A threat that came later: a subclass that measures moves by half their length."""

    def distance(self, delta: Tensor) -> Tensor:
        return 0.5 * super().distance(delta)


@dataclass(frozen=True)
class Later(Displacement):
    """A goal that came later."""


def clean() -> TokenMeasure:
    return TokenMeasure(draw(N, D, seed=5))


def ask(
    layer: TokenMap | None = None,
    threat: Threat | None = None,
    goal: Goal | None = None,
    *,
    tokens: TokenMeasure | None = None,
) -> Problem:
    return Problem(
        attention() if layer is None else layer,
        clean() if tokens is None else tokens,
        FrobeniusBall() if threat is None else threat,
        GOALS[0] if goal is None else goal,
    )


def accepted(method: CertificateMethod) -> Iterator[Problem]:
    """Problems that the method answers, one for each of its layers."""
    for kind in method.layers:
        for threat in THREATS:
            found = [
                p
                for p in (ask({**LAYERS, **NETWORKS}[kind](), threat, goal) for goal in GOALS)
                if method.refuses(p) is None
            ]
            if found:
                yield found[0]
                break


def specifications(base: type[Any] = Specification) -> Iterator[type[Any]]:
    """Every layer specification of the package."""
    kinds: list[type[Any]] = base.__subclasses__()
    for kind in kinds:
        if kind.__module__.startswith("attnrobust"):
            if "__dataclass_fields__" in vars(kind):
                yield kind
            yield from specifications(kind)
