"""A whole network, or a part of it, as a graph of nodes with named states."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.wiring import Wiring


@dataclass(frozen=True, eq=False)
class NetworkGraph(Wiring):
    """A network of exact nodes; a ``TokenMap``, so it can be the network of a ``Problem``.

    Masses belong to the input's tokens and act in every attention and every mean. A network that pools gives ONE row,
    (*b, 1, e), not n copies of it: "all", "mean" and row 0 of a goal are then the same thing, and no displacement is
    counted n times. ``output_mass`` gives the masses of the output's rows, to resolve a goal with.

    Args:
        width: Token width of the input.
        steps: Every node in an order in which each reads only earlier states. The last one computes the output.
        depth_names: The states at which tokens may be said to move (embeddings, block inputs), in their order.
        source: The name of the input state.

    Raises:
        InputError: Names that repeat, a state read before it is computed or never read, widths that do not fit, a depth
            on which the output does not depend alone.

    Examples:
        >>> from attnrobust.layers.graph import Affine, Step, Sum
        >>> twice = Affine(2.0 * torch.eye(2, dtype=torch.float64))
        >>> graph = NetworkGraph(2, (Step("twice", twice, ("input",)), Step("out", Sum(), ("input", "twice"))))
        >>> graph(torch.ones(1, 2, dtype=torch.float64))
        tensor([[3., 3.]], dtype=torch.float64)
    """

    def __call__(self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None) -> Tensor:
        """Evaluate; differentiable by autograd.

        Args:
            x: Tokens, (n, d) or batched.
            mass: Token masses, (n,) or any shape that broadcasts over the batch; None means equal masses.

        Returns:
            (*b, n, e); (*b, 1, e) after pooling; more rows after fixed tokens.
        """
        return self.states(x, mass, keep=(self.output,))[self.output]

    def states(
        self,
        x: Float[Tensor, "*b n d"],
        mass: Float[Tensor, "*m n"] | None = None,
        *,
        keep: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """The value of every state, or of those in ``keep`` (others are dropped once read); differentiable."""
        if x.shape[-1] != self.width:
            raise InputError(f"the tokens have width {x.shape[-1]}, the network takes {self.width}")
        kept = set(self.names if keep is None else keep)
        self.require(*kept)
        live, masses = {self.source: x}, self.masses(mass, int(x.shape[-2]))
        for step in self.steps:
            inputs = tuple(live[name] for name in step.reads)
            live[step.name] = step.node.forward(inputs, masses[step.reads[0]])
            for name in self.last_read[step.name]:
                if name not in kept:
                    del live[name]
        return {name: value for name, value in live.items() if name in kept}

    def output_mass(self, mass: Float[Tensor, "n"] | None, rows: int) -> Float[Tensor, "r"]:
        """Masses of the output's rows, which sum to 1, for ``rows`` input tokens of the given (None: equal) masses."""
        found, count = self.masses(mass, rows)[self.output], self.rows(rows)[self.output]
        return torch.full((count,), 1.0 / count, dtype=torch.float64) if found is None else found / found.sum()

    @torch.no_grad()
    def linearise(self, x: Float[Tensor, "n d"], mass: Float[Tensor, "n"] | None = None) -> Linearisation:
        """Every clean state with its derivatives.

        Raises:
            InputError: A batch, a wrong width, a state that is not finite.
        """
        if x.ndim != 2:
            raise InputError(f"linearise takes one input (n, d); got shape {tuple(x.shape)}")
        clean, masses = self.states(x.detach().to(torch.float64), mass), self.masses(mass, int(x.shape[-2]))
        broken = [name for name, value in clean.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise InputError(f"state {broken[0]} is not finite at this input; its scores or weights overflow")
        nodes = {
            step.name: step.node.at(tuple(clean[name] for name in step.reads), masses[step.reads[0]])
            for step in self.steps
        }
        return Linearisation(wiring=self, clean=clean, masses=masses, nodes=nodes)

    @property
    def features(self) -> frozenset[str]:
        """The features of all nodes: what a certificate must declare."""
        return frozenset().union(*(step.node.features for step in self.steps))

    # ---- parts and identity ----------------------------------------------------------------------------------------

    def depths(self) -> tuple[str, ...]:
        """The states at which tokens may move; ``tail`` gives the network from each on."""
        return self.depth_names

    def part(self, start: str, stop: str) -> "NetworkGraph":
        """The network from one state to another; states keep their names.

        Raises:
            InputError: ``stop`` is not computed from ``start`` alone.
        """
        steps = self.between(start, stop)
        part = NetworkGraph(self.widths[start], steps, depth_names=(start,), source=start)
        inside = set(part.cuts()) - {start}
        return replace(part, depth_names=(start, *(name for name in self.depth_names if name in inside)))

    def tail(self, from_node: str) -> "NetworkGraph":
        """The network from an inner state on, with that state as its input and its masses as the input's."""
        return self.part(from_node, self.output)

    def describe(self) -> str:
        """A table: state, kind, what it reads, widths; the depths carry a star."""
        rows = [("state", "kind", "reads", "width"), (self._starred(self.source), "", "", str(self.width))]
        for step in self.steps:
            into = ", ".join(str(self.widths[name]) for name in step.reads)
            widths = f"{into} -> {self.widths[step.name]}"
            rows.append((self._starred(step.name), step.node.kind, ", ".join(step.reads), widths))
        sizes = [max(len(row[column]) for row in rows) for column in range(4)]
        padded = (map(str.ljust, row, sizes) for row in rows)
        return "\n".join("  ".join(cells).rstrip() for cells in padded)

    def _starred(self, name: str) -> str:
        return f"{name} *" if name in self.depth_names else name

    def to(self, device: torch.device | str) -> "NetworkGraph":
        """The same network on another device."""
        return replace(self, steps=tuple(replace(step, node=step.node.to(device)) for step in self.steps))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the nodes and their wiring; names and depths do not count."""
        position = {name: str(index) for index, name in enumerate(self.names)}
        parts = [f"{step.node.digest}({','.join(position[name] for name in step.reads)})" for step in self.steps]
        return hashlib.sha256(";".join(("network graph", str(self.width), *parts)).encode()).hexdigest()
