"""Metrics of the ports and importances of outputs, from random second-order sensitivities; any positive ones are sound.

A remainder R_m hurts through ``<g, Y_m f_m''[T_m a, R_m]>``: the typical size of what it meets, per token, is the
metric in which R_m is measured. The typical size of the cotangent at a node's output is the importance in which its
remainder is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Port, Readout, backwards, curved_steps, root_of
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.wiring import Step
from attnrobust.layers.normalisation import LayerNorm
from attnrobust.numerics.rounding import SMALLEST

SAMPLES = 24
TOKEN_FLOOR = 0.5  # of the port's root mean square: raw sizes are inverse to the metric
ENTRY_FLOOR = 0.2


@dataclass(frozen=True, eq=False)
class Metrics:
    """Ports in their metrics, and importances of their nodes' outputs.

    Args:
        ports: Of every curved node, in order.
        importance: By node name, with the shape of its output.
    """

    ports: tuple[Port, ...]
    importance: Mapping[str, Tensor]


def sampled_metrics(record: Linearisation, moves: Moves, output: Readout, *, seed: int) -> Metrics:
    """Metrics from random directions of moves and of the output; independent of every sketch that has another seed."""
    generator = torch.Generator().manual_seed(seed)
    device = moves.movable.device

    def draw(size: int) -> Tensor:
        return torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64).to(device)

    steps = curved_steps(record)
    along = record.along(moves.tokens(draw(moves.size))).features
    cotangents = record.pull(output.cotangents(draw(output.size)), [step.name for step in steps])
    ports, importance = [], {}
    for step in steps:
        edges = record.nodes[step.name].bilinear_adjoint(along[step.name], cotangents[step.name])
        roots, maps = zip(*(_root(record, step, name) for name in step.reads), strict=True)
        back = [backwards(edge, matrix) for edge, matrix in zip(edges, maps, strict=True)]
        whole = torch.stack([edge.square().mean() for edge in back]).mean()
        shapes = [_raw_shape(step, record.clean[name]) for name in roots]
        scales = tuple(_scale(edge, whole, shape) for edge, shape in zip(back, shapes, strict=True))
        ports.append(Port(step.name, step.reads, roots, maps, scales))
        importance[step.name] = _importance(cotangents[step.name])
    return Metrics(tuple(ports), importance)


def _root(record: Linearisation, step: Step, state: str) -> tuple[str, Tensor | None]:
    """The root of an edge; only nodes that act entry by entry count the map from it in their ranges."""
    return root_of(record, state) if isinstance(step.node, Activate | Product) else (state, None)


def _raw_shape(step: Step, clean: Tensor) -> Tensor:
    """Relative sensitivity of a node to a raw change of each token, (n, 1): a normalisation divides by its size."""
    if not isinstance(step.node, Normalise):
        return torch.ones_like(clean[:, :1])
    norm = step.node.norm
    u = clean - clean.mean(dim=-1, keepdim=True) if isinstance(norm, LayerNorm) else clean
    inverse = (u.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    return inverse / inverse.square().mean().sqrt()


def _scale(edge: Tensor, whole: Tensor, shape: Tensor) -> Tensor:
    if not float(whole) > SMALLEST:
        return torch.ones_like(edge[0])
    token = edge.square().mean(0).mean(-1, keepdim=True)
    return torch.maximum(token.sqrt(), TOKEN_FLOOR * whole.sqrt() * shape).expand_as(edge[0]).contiguous()


def _importance(cotangent: Tensor) -> Tensor:
    square = cotangent.square().mean(0)
    mean = square.mean()
    if not float(mean) > SMALLEST:
        return torch.ones_like(square)
    return (square / mean + ENTRY_FLOOR**2).sqrt()
