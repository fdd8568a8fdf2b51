"""A whole network for atoms instead of tokens: every node that knows rows by their places gets those of the parents."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions, ConcatTokens, PoolMean, PoolRow
from attnrobust.threats.copies import CausalOrder

ExpandAttention = Callable[[Attention, Tensor, int, CausalOrder], Attention]
BY_ROW = (Affine, Scale, Sum, Product, Activate, Normalise, PoolMean)
"""Nodes that treat all rows alike, or by their masses alone."""


def expand_graph(
    graph: NetworkGraph, parent: Int[Tensor, "m"], n: int, *, order: CausalOrder, attention: ExpandAttention
) -> NetworkGraph:
    """The network for atoms with the given parents; the graph itself where no node knows rows by their places.

    Args:
        graph: A network.
        parent: Parent of each atom.
        n: Number of clean tokens.
        order: Meaning of a causal mask.
        attention: Expands one attention layer, or refuses it.

    Raises:
        UnsupportedModelError: A node of which it is not known what it does with atoms; names its state.
    """
    rows = {graph.source: (parent, n)}
    steps = []
    for step in graph.steps:
        own, count = rows[step.reads[0]]
        try:
            node = _expanded(step.node, own, count, order, attention)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"state {step.name}: {error}") from error
        rows[step.name] = _rows_behind(step.node, own, count)
        steps.append(step if node is step.node else replace(step, node=node))
    changed = any(new is not old for new, old in zip(steps, graph.steps, strict=True))
    return replace(graph, steps=tuple(steps)) if changed else graph


def _expanded(node: Node, parent: Tensor, n: int, order: CausalOrder, attention: ExpandAttention) -> Node:
    if type(node) is Attend:
        layer = attention(node.attention, parent, n, order)
        return node if layer is node.attention else Attend(layer)
    if type(node) is PoolRow:
        first = int((parent == node.row % n).nonzero()[0, 0])
        return node if first == node.row else PoolRow(first)
    if type(node) is AddPositions:
        own = node.table[parent]  # an atom is at its parent's position
        return node if torch.equal(own, node.table[: parent.numel()]) else AddPositions(own)
    if type(node) is ConcatTokens or type(node) in BY_ROW:
        return node
    raise UnsupportedModelError(f"it is not known what {node.kind} does with split or copied tokens")


def _rows_behind(node: Node, parent: Tensor, n: int) -> tuple[Tensor, int]:
    """Parents of the rows of a node's output, and how many clean rows it has."""
    if isinstance(node, PoolRow | PoolMean):
        return parent.new_zeros(1), 1
    if isinstance(node, ConcatTokens):
        added = int(node.tokens.shape[0])
        return torch.cat([torch.arange(added, device=parent.device), parent + added]), n + added
    return parent, n


def pools(graph: object) -> bool:
    """Whether it is a network that gives one row whatever the number of tokens."""
    return isinstance(graph, NetworkGraph) and graph.rows(2)[graph.output] == 1


def picked_tokens(graph: NetworkGraph, n: int) -> frozenset[int]:
    """Input tokens whose own rows a network picks out; fixed tokens before the input's do not count."""
    found = set()
    rows = {graph.source: (torch.arange(n), n)}
    for step in graph.steps:
        own, count = rows[step.reads[0]]
        rows[step.name] = _rows_behind(step.node, own, count)
        if isinstance(step.node, PoolRow):
            found.add(step.node.row % count - (count - n))
    return frozenset(token for token in found if token >= 0)
