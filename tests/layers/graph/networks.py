"""Small random nodes and networks, and nested autodiff to compare their closed forms with."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    ConcatTokens,
    FeedForward,
    GraphBuilder,
    NetworkGraph,
    PoolMean,
    PoolRow,
)
from attnrobust.layers.normalisation import LayerNorm, RMSNorm

ACTIVATIONS: tuple[Any, ...] = ("gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid", "relu")
SMOOTH = ACTIVATIONS[:-1]
D = 4


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def masses(n: int) -> Tensor:
    return torch.softmax(random(n), dim=0)


def attention(*, width: int = D, strength: float = 1.0, **options: Any) -> Attention:
    size = (strength / width) ** 0.5
    return Attention(
        w_q=random(2, width, 3, scale=size), w_k=random(2, width, 3, scale=size), w_v=random(2, width, 3, scale=0.5),
        b_q=random(2, 3), b_k=random(2, 3), b_v=random(2, 3), w_o=random(2, 3, width, scale=0.5), b_o=random(width),
        **options,
    )  # fmt: skip


def block_parts(activation: Any, *, gated: bool = False, rms: bool = False, causal: bool = False) -> dict[str, Any]:
    """The arguments of one block."""
    norm = RMSNorm if rms else LayerNorm
    mlp = FeedForward(
        w_1=random(D, 6), b_1=random(6), w_2=random(6, D, scale=0.4), b_2=random(D), activation=activation,
        w_gate=random(D, 6) if gated else None, b_gate=random(6) if gated else None,
    )  # fmt: skip
    norms = {name: norm(weight=random(D), bias=random(D), eps=1e-5) for name in ("norm_1", "norm_2")}
    return {"attention": attention(causal=causal), "mlp": mlp, **norms}


def network(order: str, blocks: int, activation: Any, *, head: str = "none", **options: Any) -> NetworkGraph:
    """A small network of ``order`` "post" or "pre" blocks with a head: "none", "cls", "mean" or "last"."""
    builder = GraphBuilder(D)
    if head == "cls":
        builder.add("class", ConcatTokens(random(1, D), mass=torch.tensor([0.3], dtype=torch.float64)))
        builder.add("positions", AddPositions(random(9, D)))
    for index in range(blocks):
        add = builder.post_norm_block if order == "post" else builder.pre_norm_block
        add(f"block{index}", **block_parts(activation, **options))
    if head != "none":
        builder.add("pool", {"cls": PoolRow(0), "mean": PoolMean(), "last": PoolRow(-1)}[head])
        builder.add("pooler", Affine(random(D, 5), random(5)))
        builder.add("pooler.act", Activate("tanh"))
        builder.add("head", Affine(random(5, 3), random(3)))
    return builder.build()


def examples(activations: tuple[Any, ...] = SMOOTH) -> Iterator[tuple[str, NetworkGraph]]:
    """Networks of 1 to 3 blocks of both orders with every activation, gates, norms and heads."""
    heads = ("none", "cls", "mean", "last")
    for index, activation in enumerate(activations):
        for order in ("post", "pre"):
            options = {"gated": index % 2 == 0, "rms": index % 3 == 1, "causal": heads[index % 4] == "last"}
            graph = network(order, 1 + index % 3, activation, head=heads[index % 4], **options)
            yield f"{order}-{activation}", graph


def nested(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], *directions: tuple[Tensor, ...]) -> Tensor:
    """The derivative of order ``len(directions)`` along them by nested autodiff of ``<y, f>``, which is linear in y.

    LayerNorm by its formula: through torch's fused one nested autodiff gives wrong values (2.13: forward from the
    second derivative on, reverse from the third).
    """
    at = [value.clone().requires_grad_() for value in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "layer_norm", _layer_norm)
        value = f(*at)
    y = torch.ones_like(value, requires_grad=True)
    readout = (y * value).sum()
    for direction in directions:
        gradients = torch.autograd.grad(readout, at, create_graph=True, allow_unused=True, materialize_grads=True)
        readout = sum(((g * d).sum() for g, d in zip(gradients, direction, strict=True)), start=0.0 * y.sum())
    (found,) = torch.autograd.grad(readout, y)
    return found


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    out = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias
