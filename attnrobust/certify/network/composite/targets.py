"""Where the deviation of a network is measured: what a curved node reads, or the part of the output that counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.node import Edges
from attnrobust.layers.graph.wiring import Step


@dataclass(frozen=True, eq=False)
class Port:
    """What one curved node reads: all of its edges, flattened into one vector, in a metric.

    ``flat(e)`` has the entries ``scales * e``; its Euclidean norm is the metric of the port.

    Args:
        name: The curved step.
        reads: States of its edges.
        scales: Positive factors of every entry of every edge.
    """

    name: str
    reads: tuple[str, ...]
    scales: Edges

    @property
    def states(self) -> tuple[str, ...]:
        """The states that are read, each once."""
        return tuple(dict.fromkeys(self.reads))

    @cached_property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(scale.numel() for scale in self.scales)

    def flat(self, tangents: Mapping[str, Tensor]) -> Float[Tensor, "*b N"]:
        """The scaled edges of tangents at the states, as one vector."""
        parts = [(scale * tangents[name]).flatten(-2) for name, scale in zip(self.reads, self.scales, strict=True)]
        return torch.cat(parts, dim=-1)

    def edges(self, flat: Float[Tensor, "*b N"]) -> Edges:
        """The edges of one flat vector: the inverse of ``flat``."""
        parts = flat.split([scale.numel() for scale in self.scales], dim=-1)
        return tuple(part.unflatten(-1, scale.shape) / scale for part, scale in zip(parts, self.scales, strict=True))

    def flat_cotangent(self, edges: Edges) -> Float[Tensor, "*b N"]:
        """The transpose of ``edges``."""
        return torch.cat([(y / scale).flatten(-2) for y, scale in zip(edges, self.scales, strict=True)], dim=-1)

    def cotangents(self, flat: Float[Tensor, "*b N"]) -> dict[str, Tensor]:
        """The transpose of ``flat``: cotangents at the states."""
        parts = flat.split([scale.numel() for scale in self.scales], dim=-1)
        shaped = [part.unflatten(-1, scale.shape) * scale for part, scale in zip(parts, self.scales, strict=True)]
        return added(self.reads, shaped)


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
