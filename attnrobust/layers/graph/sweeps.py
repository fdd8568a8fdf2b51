"""The first derivative of a whole network at clean tokens, by sweeps over its nodes.

``X_{m->l}``, the derivative of state l by an additive change of state m with everything after m recomputed, is the sum
over all paths of the products of the nodes' ``jvp``; a forward sweep applies it, a backward one its transpose.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.node import Edges, NodeState
from attnrobust.layers.graph.wiring import Step, Wiring
from attnrobust.numerics.linear_map import LinearMap

Sources = Callable[[str], Tensor | None]
InnerCotangents = Callable[[str], Edges | None]
Visit = Callable[[Step, Edges], None]


@dataclass(frozen=True, eq=False)
class Sweeps:
    """All clean states of a network with their first derivatives.

    ``start`` None means the input, ``stop`` None the output; both may be any states, and a direction at ``start`` is an
    additive change of that state. Directions and cotangents take any leading batch dimensions, which broadcast.

    Args:
        wiring: The network.
        clean: Clean value of every state.
        masses: Masses of every state's rows; None means equal.
        nodes: The derivatives of every step's node.
    """

    wiring: Wiring
    clean: Mapping[str, Tensor]
    masses: Mapping[str, Tensor | None]
    nodes: Mapping[str, NodeState[Any]]

    # ---- first order -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, sources: Mapping[str, Tensor], targets: Iterable[str]) -> dict[str, Tensor]:
        """``sum_m X_{m->l} sources[m]`` at every target l: tangents of changes of several states at once."""
        wanted = self._checked(sources, targets)
        return self._filled(self._forward(sources.get, wanted), wanted, _common_batch(sources))

    @torch.no_grad()
    def pull(self, cotangents: Mapping[str, Tensor], targets: Iterable[str]) -> dict[str, Tensor]:
        """``sum_l X_{m->l}^T cotangents[l]`` at every target m: the transpose of ``push``."""
        wanted = self._checked(cotangents, targets)
        return self._filled(self._backward(cotangents, wanted), wanted, _common_batch(cotangents))

    def jvp(self, a: Tensor, *, start: str | None = None, stop: str | None = None) -> Tensor:
        """``X_{start->stop} a``."""
        target = self._stop(stop)
        return self.push({self._start(start): a}, (target,))[target]

    def vjp(self, y: Tensor, *, start: str | None = None, stop: str | None = None) -> Tensor:
        """``X_{start->stop}^T y``: the gradient of the readout ``<y, stop>``."""
        target = self._start(start)
        return self.pull({self._stop(stop): y}, (target,))[target]

    def linear_map(self, start: str | None = None, stop: str | None = None) -> LinearMap:
        """``X_{start->stop}`` by its products, to bound its norm with."""
        first, last = self._start(start), self._stop(stop)
        self.wiring.require(first, last)
        return LinearMap(
            matvec=lambda a: self.jvp(a, start=first, stop=last),
            rmatvec=lambda y: self.vjp(y, start=first, stop=last),
            in_shape=tuple(self.clean[first].shape),
            out_shape=tuple(self.clean[last].shape),
            device=self.clean[first].device,
        )

    def gradient(self, c: Tensor, *, start: str | None = None) -> Tensor:
        """Gradient of the readout ``<c, output>`` in the state ``start``; c has the output's shape."""
        return self.vjp(c, start=start)

    # ---- sweeps ----------------------------------------------------------------------------------------------------

    def _forward(self, sources: Sources, targets: Iterable[str], visit: Visit | None = None) -> dict[str, Tensor]:
        """Tangents at the targets (those that anything reaches).

        Args:
            sources: What is added at each state; asked in the order of evaluation.
            targets: Tangents to keep; the sweep ends at the last one, without any at the output.
            visit: Sees the tangents that each node reads.
        """
        wiring, missing = self.wiring, set(targets) or {self.wiring.output}
        kept, live = frozenset(missing), dict[str, Tensor]()
        _add(live, wiring.source, sources(wiring.source))
        missing.discard(wiring.source)
        for step in wiring.steps:
            if not missing:
                break
            edges = self._edges(live, step)
            if edges is not None:
                if visit is not None:
                    visit(step, edges)
                _add(live, step.name, self.nodes[step.name].jvp(edges))
            _add(live, step.name, sources(step.name))
            for name in set(wiring.last_read[step.name]) - kept:
                live.pop(name, None)
            missing.discard(step.name)
        return live

    def _edges(self, live: Mapping[str, Tensor], step: Step) -> Edges | None:
        """What a step reads, with zeros on edges that nothing reaches; None where nothing reaches any."""
        if not any(name in live for name in step.reads):
            return None
        return tuple(live[name] if name in live else torch.zeros_like(self.clean[name]) for name in step.reads)

    def _backward(
        self, seeds: Mapping[str, Tensor], targets: Iterable[str], inner: InnerCotangents | None = None
    ) -> dict[str, Tensor]:
        """Cotangents at the targets (where there are any).

        Args:
            seeds: Cotangents given at states.
            targets: Cotangents to keep; the sweep ends at the earliest one.
            inner: Further cotangents of what each node reads; asked in reverse order.
        """
        kept, live = frozenset(targets), dict(seeds)
        missing = set(kept)
        for step in reversed(self.wiring.steps):
            missing.discard(step.name)
            if not missing:
                break
            if step.name in live:
                self._read(live, step, self.nodes[step.name].vjp(live[step.name]))
            if inner is not None:
                self._read(live, step, inner(step.name))
            if step.name not in kept:
                live.pop(step.name, None)
        return live

    def _read(self, live: dict[str, Tensor], step: Step, edges: Edges | None) -> None:
        for name, cotangent in zip(step.reads, edges, strict=True) if edges is not None else ():
            _add(live, name, cotangent)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _start(self, name: str | None) -> str:
        return self.wiring.source if name is None else name

    def _stop(self, name: str | None) -> str:
        return self.wiring.output if name is None else name

    def _checked(self, changes: Mapping[str, Tensor], targets: Iterable[str] = ()) -> tuple[str, ...]:
        wanted = tuple(targets)
        self.wiring.require(*changes, *wanted)
        for name, value in changes.items():
            expected = tuple(self.clean[name].shape)
            if tuple(value.shape[-2:]) != expected:
                raise InputError(f"a change of state {name} has shape {tuple(value.shape)}; it must end in {expected}")
        return wanted

    def _filled(self, found: Mapping[str, Tensor], targets: Iterable[str], batch: tuple[int, ...]) -> dict[str, Tensor]:
        """What was found at the targets in the full batch, zeros where nothing arrived."""
        zero = next(iter(self.clean.values())).new_zeros(())
        return {name: found.get(name, zero).expand(*batch, *self.clean[name].shape) for name in targets}


def _common_batch(changes: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(value.shape[:-2] for value in changes.values())))


def _add(live: dict[str, Tensor], name: str, value: Tensor | None) -> None:
    if value is not None:
        live[name] = live[name] + value if name in live else value
