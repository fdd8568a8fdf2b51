"""Where the deviation of a network is measured: what a curved node reads, or the part of the output that counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.node import Edges
from attnrobust.layers.graph.wiring import Step


@dataclass(frozen=True, eq=False)
class Port:
    """What one curved node reads: all of its edges, flattened into one vector, in a metric.

    An edge that is a wide affine image of a narrower state (the inside of an MLP) is represented by that root: a
    remainder of the root reaches one neuron with the norm of its weights, one of the wide edge with all of its size.
    ``flat(e)`` has the entries ``scales * e`` of the roots; its Euclidean norm is the metric of the port.

    Args:
        name: The curved step.
        reads: States of its edges.
        roots: The state behind each edge.
        maps: Matrix from each root to its edge; None: they are the same.
        scales: Positive factors of every entry of every root.
    """

    name: str
    reads: tuple[str, ...]
    roots: tuple[str, ...]
    maps: tuple[Tensor | None, ...]
    scales: Edges

    @property
    def states(self) -> tuple[str, ...]:
        """The roots, each once."""
        return tuple(dict.fromkeys(self.roots))

    @cached_property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(scale.numel() for scale in self.scales)

    def flat(self, tangents: Mapping[str, Tensor]) -> Float[Tensor, "*b N"]:
        """The scaled roots of tangents at the states, as one vector."""
        parts = [(scale * tangents[name]).flatten(-2) for name, scale in zip(self.roots, self.scales, strict=True)]
        return torch.cat(parts, dim=-1)

    def edges(self, flat: Float[Tensor, "*b N"]) -> Edges:
        """The edges of one flat vector."""
        roots = zip(self._split(flat), self.scales, self.maps, strict=True)
        return tuple(forwards(part / scale, matrix) for part, scale, matrix in roots)

    def flat_cotangent(self, edges: Edges) -> Float[Tensor, "*b N"]:
        """The transpose of ``edges``."""
        parts = zip(edges, self.scales, self.maps, strict=True)
        return torch.cat([(backwards(y, matrix) / scale).flatten(-2) for y, scale, matrix in parts], dim=-1)

    def cotangents(self, flat: Float[Tensor, "*b N"]) -> dict[str, Tensor]:
        """The transpose of ``flat``: cotangents at the states."""
        return added(self.roots, [part * scale for part, scale in zip(self._split(flat), self.scales, strict=True)])

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([scale.numel() for scale in self.scales], dim=-1)
        return [part.unflatten(-1, scale.shape) for part, scale in zip(parts, self.scales, strict=True)]


def forwards(root: Tensor, matrix: Tensor | None) -> Tensor:
    """The edge of a root."""
    return root if matrix is None else root @ matrix


def backwards(edge: Tensor, matrix: Tensor | None) -> Tensor:
    """The transpose of ``forwards``."""
    return edge if matrix is None else edge @ matrix.T


def root_of(record: Linearisation, state: str) -> tuple[str, Tensor | None]:
    """The narrow state of which ``state`` is a wider affine image token by token, and the matrix between them."""
    matrix: Tensor | None = None
    steps = {step.name: step for step in record.wiring.steps}
    while state in steps:
        node = steps[state].node
        if not isinstance(node, Affine) or node.weight.shape[0] >= node.weight.shape[1]:
            break
        matrix = node.weight if matrix is None else node.weight @ matrix
        state = steps[state].reads[0]
    return state, matrix


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear readout of the output: some of its rows pooled, or everything (weights None).

    Args:
        state: The output state.
        shape: Its shape (n, e).
        weights: Row weights or None.
        functional: Row vector that reads the pooled output, (e,), or None: all of it.
    """

    state: str
    shape: tuple[int, int]
    weights: Float[Tensor, "n"] | None = None
    functional: Float[Tensor, "e"] | None = None

    @property
    def states(self) -> tuple[str, ...]:
        """The output."""
        return (self.state,)

    @property
    def size(self) -> int:
        """Numbers that are read."""
        rows = self.shape[0] if self.weights is None else 1
        return rows * (self.shape[1] if self.functional is None else 1)

    def flat(self, tangents: Mapping[str, Tensor]) -> Float[Tensor, "*b N"]:
        """What is read of tangents at the states."""
        value = tangents[self.state]
        pooled = value if self.weights is None else self.weights[None, :] @ value
        read = pooled if self.functional is None else pooled @ self.functional[:, None]
        return read.flatten(-2)

    def cotangents(self, flat: Float[Tensor, "*b N"]) -> dict[str, Tensor]:
        """The transpose of ``flat``."""
        rows = self.shape[0] if self.weights is None else 1
        read = flat.unflatten(-1, (rows, -1))
        pooled = read if self.functional is None else read * self.functional
        return {self.state: pooled if self.weights is None else self.weights[:, None] * pooled}


Target = Port | Readout


def added(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values by name; those of one name are added."""
    out: dict[str, Tensor] = {}
    for name, value in zip(names, values, strict=True):
        out[name] = out[name] + value if name in out else value
    return out


def curved_steps(record: Linearisation) -> tuple[Step, ...]:
    """The steps whose node is not affine, in order."""
    return tuple(step for step in record.wiring.steps if not step.node.affine)
