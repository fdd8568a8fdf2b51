"""What a reader found in a model, and the graph that it makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.blocks import GraphBuilder
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Node
from attnrobust.models.networks.pieces import Block, Piece

EMBEDDINGS = "embeddings"
"""The hidden states that enter the first block; also called ``block:0``."""
ENTRY = "input"
"""The input of a model with other parts before its first block."""

HeadName = Literal["logits", "states", "mean"]
"""The model's own head, the last hidden states, or the mean of these."""


@dataclass(frozen=True)
class Wanted:
    """Which output of a model is asked for.

    Args:
        head: None means the model's own head, or the last hidden states where it has none.
        row: The token whose output it is, for outputs with one row per token (negative ones count from the end).
    """

    head: HeadName | None = None
    row: int | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """What follows the last piece, and where the model itself shows the same.

    Args:
        kind: Readable name.
        nodes: The nodes with their names, one after the other.
        module: Path of the module whose forward call gives the output.
        attribute: The output's name there; "" where the call gives a tensor.
        rows: Which rows of the model's output it is: all, their mean, or one.
        labels: Names of the classes; empty where there are none.
    """

    kind: str
    nodes: tuple[tuple[str, Node], ...] = ()
    module: str = ""
    attribute: str = ""
    rows: int | Literal["all", "mean"] = "all"
    labels: tuple[str, ...] = ()

    def of(self, output: Tensor) -> Tensor:
        """The graph's output from the model's (rows, e)."""
        if self.rows == "all":
            return output
        if self.rows == "mean":
            return output.mean(dim=0, keepdim=True)
        if not -output.shape[0] <= self.rows < output.shape[0]:
            raise InputError(f"row {self.rows} does not exist; the model's output has {output.shape[0]} rows")
        return output[self.rows][None]


@dataclass(frozen=True, eq=False)
class Plan:
    """A model as pieces and a head.

    Args:
        architecture: The model's class.
        pieces: What runs one after the other, each a module of the model.
        head: What follows.
        batch_first: Whether the model's tensors are (1, n, d) or (n, 1, d).
        rounds_inside: The model's code rounds to float32 in any precision; it is run with that left out.
    """

    architecture: str
    pieces: tuple[Piece, ...]
    head: Head
    batch_first: bool = True
    rounds_inside: bool = False
    _graphs: dict[int, NetworkGraph] = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The transformer blocks."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Block))

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states before, between and after the pieces: one more than there are pieces."""
        kinds, names = [isinstance(piece, Block) for piece in self.pieces], []
        for index in range(len(self.pieces) + 1):
            before = sum(kinds[:index])
            enters = index < len(kinds) and kinds[index]
            ends = index > 0 and kinds[index - 1] and not any(kinds[index:])  # what leaves the last block
            named = f"block:{before}" if before else EMBEDDINGS
            names.append(named if enters or ends else self.pieces[index - 1].path if index else ENTRY)
        return tuple(names)

    @property
    def depths(self) -> tuple[str, ...]:
        """The states at which tokens may move: the first one and those that enter blocks."""
        entered = zip(self.states, self.pieces, strict=False)
        return tuple(s for i, (s, piece) in enumerate(entered) if i == 0 or isinstance(piece, Block))

    def graph(self, width: int) -> NetworkGraph:
        """The network for tokens of this width, the same object at every call; its depths are ``depths``.

        Raises:
            InputError: Widths that do not fit.
        """
        if width not in self._graphs:
            self._graphs[width] = self._built(width)
        return self._graphs[width]

    def _built(self, width: int) -> NetworkGraph:
        builder, states, block = GraphBuilder(width), self.states, 0
        names = {builder.latest: states[0]}
        for piece, after in zip(self.pieces, states[1:], strict=True):
            piece.append(builder, f"block:{block}" if isinstance(piece, Block) else piece.path)
            block += isinstance(piece, Block)
            names[builder.latest] = after
        for name, node in self.head.nodes:
            builder.add(f"head.{name}", node)
        return renamed(builder.build(), names)


def renamed(graph: NetworkGraph, names: Mapping[str, str]) -> NetworkGraph:
    """The same graph with other names for some of its states."""

    def new(name: str) -> str:
        return names.get(name, name)

    steps = tuple(replace(s, name=new(s.name), reads=tuple(map(new, s.reads))) for s in graph.steps)
    return NetworkGraph(graph.width, steps, depth_names=tuple(map(new, graph.depth_names)), source=new(graph.source))
