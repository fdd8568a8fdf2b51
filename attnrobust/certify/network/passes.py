"""What one linear pass through a network costs, roughly."""

from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.network_graph import NetworkGraph

FLOPS_PER_SECOND = 1.0e10  # float64 products on one core


def pass_flops(network: NetworkGraph, tokens: int) -> float:
    """Of one linear pass of one vector through a network."""
    return sum(_flops(step.node, tokens) for step in network.steps)


def _flops(node: object, tokens: int) -> float:
    """Of one linear pass of one vector through a node."""
    if isinstance(node, Affine):
        return 2.0 * tokens * node.weight.numel()
    if isinstance(node, Attend):
        layer = node.attention
        out = 0 if layer.w_o is None else layer.w_o.numel()
        weights = layer.w_q.numel() + layer.w_k.numel() + layer.w_v.numel() + out
        return 2.0 * tokens * (weights + 4.0 * tokens * layer.heads * (layer.key_width + layer.value_width))
    return 20.0 * tokens
