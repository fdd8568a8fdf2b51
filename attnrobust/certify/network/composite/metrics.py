"""Metrics of the ports and importances of outputs, from random second-order sensitivities; any positive ones are sound.

A remainder R_m hurts through ``<g, Y_m f_m''[T_m a, R_m]>``: its typical size per token (per neuron behind an
activation) is the metric in which R_m is measured. The typical size of the cotangent at the node's output is the
importance in which its remainder is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Port, Readout, curved_steps
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.numerics.rounding import SMALLEST

SAMPLES = 24
TOKEN_FLOOR = 0.2  # of the port's root mean square: raw sizes are inverse to the metric
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
    draw = lambda size: torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64).to(device)  # noqa: E731
    steps = curved_steps(record)
    along = record.along(moves.tokens(draw(moves.size))).features
    cotangents = record.pull(output.cotangents(draw(output.size)), [step.name for step in steps])
    ports, importance = [], {}
    for step in steps:
        back = record.nodes[step.name].bilinear_adjoint(along[step.name], cotangents[step.name])
        whole = torch.stack([edge.square().mean() for edge in back]).mean()
        by_entry = isinstance(step.node, Activate)
        ports.append(Port(step.name, step.reads, tuple(_scale(edge, whole, by_entry) for edge in back)))
        importance[step.name] = _importance(cotangents[step.name])
    return Metrics(tuple(ports), importance)


def _scale(edge: Tensor, whole: Tensor, by_entry: bool) -> Tensor:
    square = edge.square().mean(0)
    if not float(whole) > SMALLEST:
        return torch.ones_like(square)
    if by_entry:
        return (square + ENTRY_FLOOR**2 * whole).sqrt()
    token = square.mean(-1, keepdim=True)
    return (token + TOKEN_FLOOR**2 * whole).sqrt().expand_as(square).contiguous()


def _importance(cotangent: Tensor) -> Tensor:
    square = cotangent.square().mean(0)
    mean = square.mean()
    if not float(mean) > SMALLEST:
        return torch.ones_like(square)
    return (square / mean + ENTRY_FLOOR**2).sqrt()
