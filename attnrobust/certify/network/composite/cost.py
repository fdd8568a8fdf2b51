"""How long a preparation takes, so that the long ones are refused by name."""

from dataclasses import dataclass

from attnrobust.certify.network.composite.preparation import BASIS_LIMIT
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.network_graph import NetworkGraph

FLOPS_PER_SECOND = 1.0e10  # float64 products on one core
PRODUCTS = 32.0  # of one norm: two starts of Lanczos
OVERHEAD = 1.5e-4  # seconds per node and pass, whatever the sizes


@dataclass(frozen=True)
class Cost:
    """Rough cost of one preparation.

    Args:
        seconds: On one core.
        directions: Of the sketch or the basis.
    """

    seconds: float
    directions: int


def estimated(network: NetworkGraph, tokens: int, moving: int, *, sketch: int) -> Cost:
    """Cost of a preparation for ``moving`` numbers of an input of ``tokens`` tokens."""
    curved = sum(not step.node.affine for step in network.steps)
    directions = moving if moving <= max(BASIS_LIMIT, sketch) else sketch
    one_pass = sum(_flops(step.node, tokens) for step in network.steps)
    composite = 2.0 * (curved + 1) * PRODUCTS * directions  # curvature and cross terms, two passes over half the depth
    tails = 0.5 * PRODUCTS * curved * (curved + 1)
    passes = composite + tails + moving
    overhead = OVERHEAD * len(network.steps) * (passes / max(directions, 1) + tails)
    return Cost(passes * one_pass / FLOPS_PER_SECOND + overhead, directions)


def _flops(node: object, tokens: int) -> float:
    """Of one linear pass of one vector through a node."""
    if isinstance(node, Affine):
        return 2.0 * tokens * node.weight.numel()
    if isinstance(node, Attend):
        layer = node.attention
        weights = layer.w_q.numel() + layer.w_k.numel() + layer.w_v.numel() + (0 if layer.w_o is None else layer.w_o.numel())
        return 2.0 * tokens * (weights + 4.0 * tokens * layer.heads * (layer.key_width + layer.value_width))
    return 20.0 * tokens
