"""The pieces of a model that run one after the other: transformer blocks, and chains of single nodes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.blocks import FeedForward, GraphBuilder
from attnrobust.layers.graph.node import Node
from attnrobust.layers.normalisation import LayerNorm, RMSNorm


@dataclass(frozen=True, eq=False)
class Piece(ABC):
    """A module of the model whose input and output are states of the network.

    Args:
        path: Where it is in the model.
    """

    path: str

    @abstractmethod
    def append(self, builder: GraphBuilder, name: str) -> None:
        """Add its steps; the latest state is its input, its output becomes the latest state."""


@dataclass(frozen=True, eq=False)
class Block(Piece):
    """A transformer block.

    Args:
        path: Where it is in the model.
        attention_path: Where its attention is in the model.
        attention: The attention's specification, with output projection.
        norm_1: The normalisation of the attention part.
        mlp: The feed-forward part.
        norm_2: The normalisation of the feed-forward part.
        pre_norm: Whether the normalisations stand before their parts (GPT-2, ViT) or after the sums (BERT).
    """

    attention_path: str
    attention: Attention
    norm_1: LayerNorm | RMSNorm
    mlp: FeedForward
    norm_2: LayerNorm | RMSNorm
    pre_norm: bool

    def append(self, builder: GraphBuilder, name: str) -> None:
        add = builder.pre_norm_block if self.pre_norm else builder.post_norm_block
        add(name, attention=self.attention, norm_1=self.norm_1, mlp=self.mlp, norm_2=self.norm_2)


@dataclass(frozen=True, eq=False)
class Single(Piece):
    """One node: a final normalisation, a linear layer or an activation between blocks.

    Args:
        path: Where it is in the model.
        node: What it computes.
    """

    node: Node

    def append(self, builder: GraphBuilder, name: str) -> None:
        builder.add(name, self.node)
