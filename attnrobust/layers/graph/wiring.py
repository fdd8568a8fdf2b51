"""Which node reads which state: names, widths, cuts and parts of a network graph."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.layers.graph.node import Node

INPUT = "input"
"""The usual name of the input state."""


@dataclass(frozen=True, eq=False)
class Step:
    """One node in its place.

    Args:
        name: Name of the step and of the state that it computes.
        node: The operation.
        reads: Names of the states it reads, in the order of the node's edges.

    Raises:
        InputError: Not as many states as the node has edges.
    """

    name: str
    node: Node
    reads: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(self.reads))
        if len(self.reads) != self.node.arity:
            raise InputError(
                f"step {self.name} reads {len(self.reads)} states; {self.node.kind} takes {self.node.arity}"
            )


@dataclass(frozen=True, eq=False)
class Wiring:
    """Steps in an order in which each reads only earlier states; the last one computes the output.

    Args:
        width: Token width of the input.
        steps: Every node in its place.
        depth_names: The states at which tokens may be said to move (embeddings, block inputs), in their order.
        source: The name of the input state.

    Raises:
        InputError: Names that repeat, a state read before it is computed or never read, widths that do not fit, a depth
            on which the output does not depend alone.
    """

    width: int
    steps: tuple[Step, ...]
    depth_names: tuple[str, ...] = (INPUT,)
    source: str = INPUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "depth_names", tuple(self.depth_names))
        if not self.steps:
            raise InputError("a network graph needs at least one step")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise InputError(f"state names repeat: {', '.join(repeated)}")
        _ = self.widths
        unread = set(self.names) - {read for step in self.steps for read in step.reads} - {self.output}
        if unread:
            raise InputError(f"nothing reads {', '.join(sorted(unread))}; leave out what the output does not need")
        for name in self.depth_names:
            self._require_cut(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every state in the order of evaluation, the input first."""
        return (self.source, *(step.name for step in self.steps))

    @property
    def output(self) -> str:
        """The name of the output state."""
        return self.steps[-1].name

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Width of every state."""
        widths = {self.source: self.width}
        for step in self.steps:
            missing = [name for name in step.reads if name not in widths]
            if missing:
                raise InputError(f"step {step.name} reads {missing[0]!r}, which no earlier step computes")
            try:
                widths[step.name] = step.node.out_width(tuple(widths[name] for name in step.reads))
            except InputError as error:
                raise InputError(f"step {step.name}: {error}") from error
        return widths

    @property
    def out_width(self) -> int:
        """Width of the output's rows."""
        return self.widths[self.output]

    def require(self, *names: str) -> None:
        """Raise ``UnknownNameError`` unless every name is that of a state."""
        for name in names:
            if name not in self.widths:
                raise UnknownNameError("state", name, self.names)

    def rows(self, rows: int) -> Mapping[str, int]:
        """Rows of every state for an input of ``rows`` tokens."""
        counts = {self.source: rows}
        for step in self.steps:
            counts[step.name] = step.node.out_rows(counts[step.reads[0]])
        return counts

    def masses(self, mass: Tensor | None, rows: int) -> Mapping[str, Tensor | None]:
        """Masses of the rows of every state for an input of ``rows`` tokens; None means equal ones."""
        counts, masses = self.rows(rows), {self.source: mass}
        for step in self.steps:
            first = step.reads[0]
            masses[step.name] = step.node.out_mass(masses[first], counts[first])
        return masses

    @cached_property
    def last_read(self) -> Mapping[str, tuple[str, ...]]:
        """The states that each step is the last one to read."""
        last = {name: step.name for step in self.steps for name in step.reads}
        return {step.name: tuple(name for name, at in last.items() if at == step.name) for step in self.steps}

    # ---- cuts and parts --------------------------------------------------------------------------------------------

    def cuts(self) -> tuple[str, ...]:
        """Every state that the output depends on alone, in order; ``tail`` accepts these."""
        position = {name: index for index, name in enumerate(self.names)}
        furthest = {name: position[step.name] for step in self.steps for name in step.reads}
        found, reach = [], 0  # reach: the last reader of any state before the present one
        for name in self.names[:-1]:
            if reach <= position[name]:
                found.append(name)
            reach = max(reach, furthest[name])
        return tuple(found)

    def _require_cut(self, name: str) -> None:
        self.require(name)
        if name not in self.cuts():
            raise InputError(f"{self.output} does not depend on {name} alone; choose one of {', '.join(self.cuts())}")

    def between(self, start: str, stop: str) -> tuple[Step, ...]:
        """The steps that compute one state from another.

        Raises:
            InputError: ``stop`` is not computed from ``start`` alone.
        """
        self.require(start, stop)
        wanted, kept = {stop}, []
        for step in reversed(self.steps):
            if step.name in wanted and step.name != start:
                wanted |= set(step.reads)
                kept.append(step)
        bypassed = wanted - {step.name for step in kept} - {start}
        if bypassed or not kept:
            raise InputError(f"{stop} is not computed from {start} alone; states that cut: {', '.join(self.cuts())}")
        return tuple(reversed(kept))
