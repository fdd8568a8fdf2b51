"""Whole networks as graphs of exact nodes with closed-form derivatives; ``node`` describes the protocol."""

from attnrobust.layers.graph.activation_functions import Activation
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.blocks import FeedForward, GraphBuilder
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.linearisation import Direction, Linearisation
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Edges, Node, NodeState
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions, ConcatTokens, PoolMean, PoolRow
from attnrobust.layers.graph.wiring import INPUT, Step, Wiring

__all__ = [
    "INPUT",
    "Activate",
    "Activation",
    "AddPositions",
    "Affine",
    "Attend",
    "ConcatTokens",
    "Direction",
    "Edges",
    "FeedForward",
    "GraphBuilder",
    "Linearisation",
    "NetworkGraph",
    "Node",
    "NodeState",
    "Normalise",
    "PoolMean",
    "PoolRow",
    "Product",
    "Scale",
    "Step",
    "Sum",
    "Wiring",
]
