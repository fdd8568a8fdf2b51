"""A network graph as torch's own fused operations, in float64 or float32: what the search evaluates.

Nothing here is a result. Whatever the search finds is evaluated in float64 by the graph itself. Queries, keys and
values come from one product, attention from ``scaled_dot_product_attention``, which keeps no scores for the gradient
where torch has a kernel for it; a linear map keeps nothing, its weights need no gradient. A kind of node that is not
known here runs by its own ``forward`` in float64.
"""

from collections.abc import Callable, Mapping
from functools import partial
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional

from attnrobust.attacks.search.pullback import covers
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import PoolMean, PoolRow
from attnrobust.layers.normalisation import LayerNorm

Run = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
"""A node's value from what it reads and the masses of its rows (float64)."""

KEPT = 4
"""Graphs whose fused weights are kept, the last ones used: every text of a model is a graph object of its own."""

_RECENT: list[tuple[ref[NetworkGraph], dict[torch.dtype, "PreparedNetwork"]]] = []


def prepared_network(graph: NetworkGraph, dtype: torch.dtype) -> "PreparedNetwork":
    """The graph in one precision; made once while the graph is among the last ones used."""
    found = next((entry for entry in _RECENT if entry[0]() is graph), (ref(graph), {}))
    _RECENT[:] = [found, *(entry for entry in _RECENT if entry is not found and entry[0]() is not None)][:KEPT]
    prepared = found[1]
    if dtype not in prepared:
        prepared[dtype] = PreparedNetwork(graph, dtype)
    return prepared[dtype]


class PreparedNetwork:
    """A graph with fused weights; it does not keep the graph itself alive.

    Args:
        graph: The graph.
        dtype: Precision of the evaluation.
    """

    def __init__(self, graph: NetworkGraph, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.steps = tuple((step.name, step.reads, _prepared(step.node, dtype)) for step in graph.steps)
        self.source, self.output, self.last_read = graph.source, graph.output, dict(graph.last_read)

    def __call__(self, x: Tensor, masses: Mapping[str, Tensor | None]) -> Tensor:
        """The output (b, r, e) in the precision of this copy, for tokens (b, n, d) in any; differentiable.

        Args:
            x: Tokens.
            masses: ``graph.masses`` at these tokens.
        """
        live = {self.source: x.to(self.dtype)}
        for name, reads, run in self.steps:
            live[name] = run(tuple(live[read] for read in reads), masses[reads[0]])
            for past in self.last_read[name]:
                del live[past]
        return live[self.output]


def _prepared(node: Node, dtype: torch.dtype) -> Run:
    make = _MAKERS.get(type(node))
    run = None if make is None else make(node, dtype)
    return partial(_own_forward, node, dtype) if run is None else run


def _own_forward(node: Node, dtype: torch.dtype, inputs: tuple[Tensor, ...], mass: Tensor | None) -> Tensor:
    return node.forward(tuple(value.to(torch.float64) for value in inputs), mass).to(dtype)


def _as_is(node: Node, _: torch.dtype) -> Run:
    """A node without weights, whose forward keeps the precision."""
    return node.forward


def _mean(node: Node, dtype: torch.dtype) -> Run:
    return lambda inputs, mass: node.forward(inputs, None if mass is None else mass.to(dtype))


def _affine(node: Node, dtype: torch.dtype) -> Run:
    assert isinstance(node, Affine)  # noqa: S101 - by the table; narrows the type
    weight, bias = node.weight.T.contiguous().to(dtype), None if node.bias is None else node.bias.to(dtype)
    return lambda inputs, _: functional.linear(inputs[0], weight, bias)


def _scale(node: Node, dtype: torch.dtype) -> Run:
    assert isinstance(node, Scale)  # noqa: S101 - by the table; narrows the type
    factor = torch.as_tensor(node.factor).to(dtype)
    return lambda inputs, _: inputs[0] * factor


def _normalise(node: Node, dtype: torch.dtype) -> Run:
    assert isinstance(node, Normalise)  # noqa: S101 - by the table; narrows the type
    norm, shape = node.norm, (node.norm.width,)
    weight, bias = norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)
    if isinstance(norm, LayerNorm):
        return lambda inputs, _: functional.layer_norm(inputs[0], shape, weight, bias, norm.eps)
    if bias is None:
        return lambda inputs, _: functional.rms_norm(inputs[0], shape, weight, norm.eps)
    return lambda inputs, _: functional.rms_norm(inputs[0], shape, weight, norm.eps) + bias


def _attend(node: Node, dtype: torch.dtype) -> Run | None:
    assert isinstance(node, Attend)  # noqa: S101 - by the table; narrows the type
    return FusedAttention(node.attention, dtype) if covers(node.attention) else None


_MAKERS: Mapping[type[Node], Callable[[Node, torch.dtype], Run | None]] = {
    Affine: _affine,
    Scale: _scale,
    Normalise: _normalise,
    Attend: _attend,
    **dict.fromkeys((Sum, Product, Activate, PoolRow), _as_is),
    PoolMean: _mean,
}


class FusedAttention:
    """Attention with one input product, for inputs (b, n, d)."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.heads, self.widths = layer.heads, (layer.key_width, layer.key_width, layer.value_width)
        parts = tuple(zip((layer.w_q, layer.w_k, layer.w_v), (layer.b_q, layer.b_k, layer.b_v), strict=True))
        self.w_in = torch.cat([w.transpose(0, 1).flatten(1) for w, _ in parts], dim=1).T.contiguous().to(dtype)
        biases = [w.new_zeros(w.shape[0] * w.shape[2]) if b is None else b.flatten() for w, b in parts]
        self.b_in = None if all(b is None for _, b in parts) else torch.cat(biases).to(dtype)
        self.w_out = None if layer.w_o is None else layer.w_o.flatten(0, 1).T.contiguous().to(dtype)
        self.b_out = None if layer.b_o is None else layer.b_o.to(dtype)

    def __call__(self, inputs: tuple[Tensor, ...], mass: Tensor | None) -> Tensor:
        x = inputs[0]
        n = int(x.shape[-2])
        sizes = [self.heads * width for width in self.widths]
        flat = functional.linear(x, self.w_in, self.b_in).split(sizes, dim=-1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in flat)
        if self.layer.rotary is not None:
            queries, keys = (self.layer.turned(part).to(self.dtype) for part in (queries, keys))
        bias = self.layer.score_bias(n, mass)
        mask = None if bias is None else bias.to(self.dtype)
        factor = self.layer.factor
        averages = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=factor)
        mixed = averages.transpose(-3, -2).flatten(-2)
        if self.w_out is not None:
            return functional.linear(mixed, self.w_out, self.b_out)
        return mixed if self.b_out is None else mixed + self.b_out
