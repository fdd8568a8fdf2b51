"""The second and third derivative of a whole network at clean tokens, by sweeps over its nodes.

With the tangents ``T a`` of a direction at what every node m reads, and ``X_{m->l}`` as in ``sweeps``,
``D2[a, b] = sum_m X_{m->l} f_m''[T a, T b]`` and
``D3[a, b, c] = sum_m X_{m->l} (f_m'''[T a, T b, T c] + sum f_m''[T a, T D2[b, c]])``, the inner sum over the three
choices of one: the chain rule, one sweep each with what the nodes add as sources. The adjoints in the last slot are
backward sweeps in which the nodes add the adjoints of their own forms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.node import Edges
from attnrobust.layers.graph.sweeps import InnerCotangents, Sources, Sweeps
from attnrobust.layers.graph.wiring import Step


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of a network with its features at every node that is not affine.

    Args:
        features: By step name, as the node's ``features`` gives them; none where the direction does not arrive.
        batch: Leading dimensions of the direction.
        stop: The state up to which features were computed.
    """

    features: Mapping[str, Any]
    batch: tuple[int, ...]
    stop: str


@dataclass(frozen=True, eq=False)
class Linearisation(Sweeps):
    """All clean states of a network with their derivatives; built by ``NetworkGraph.linearise``.

    ``start`` None means the input, ``stop`` None the output; both may be any states, and a direction at ``start`` is an
    additive change of that state. Directions and cotangents take any leading batch dimensions, which broadcast. Where a
    direction meets many others, compute it ``along`` the network once; its ``start`` is then not read again.

    A node without second derivative (ReLU) between ``start`` and ``stop`` raises ``UnsupportedModelError``.
    """

    def along(self, a: Tensor, *, start: str | None = None, stop: str | None = None) -> Direction:
        """The features of a direction at every node up to ``stop``."""
        sources = {self._start(start): a}
        self._checked(sources)
        return self._direction(sources.get, tuple(a.shape[:-2]), self._stop(stop))

    def along_second(self, a: Direction, b: Direction) -> Direction:
        """The features of the second derivative along a and b at every node, as if it were a direction."""
        stop = min(a.stop, b.stop, key=self.wiring.names.index)
        return self._direction(partial(self._bilinear, a=a, b=b), _batch(a, b), stop)

    @torch.no_grad()
    def second(
        self, a: Tensor | Direction, b: Tensor | Direction, *, start: str | None = None, stop: str | None = None
    ) -> Tensor:
        """``D2[a, b]`` of the map from ``start`` to ``stop``."""
        one, two = self._along((a, b), start, stop)
        return self._arrives(partial(self._bilinear, a=one, b=two), _batch(one, two), stop)

    @torch.no_grad()
    def second_adjoint(
        self, a: Tensor | Direction, y: Tensor, *, start: str | None = None, stop: str | None = None
    ) -> Tensor:
        """``u`` with ``<y, D2[a, v]> = <u, v>`` for all v: the Hessian of the readout ``<y, stop>`` times a."""
        (one,) = self._along((a,), start, stop)
        clean = self._clean_cotangents(y, stop)
        return self._returns(partial(self._bilinear_adjoint, a=one, on=clean), _batch(one, y), start)

    def hessian_product(self, c: Tensor, v: Tensor | Direction, *, start: str | None = None) -> Tensor:
        """Hessian of the readout ``<c, output>`` in the state ``start``, times v."""
        return self.second_adjoint(v, c, start=start)

    @torch.no_grad()
    def third(
        self,
        a: Tensor | Direction,
        b: Tensor | Direction,
        c: Tensor | Direction,
        *,
        start: str | None = None,
        stop: str | None = None,
    ) -> Tensor:
        """``D3[a, b, c]`` of the map from ``start`` to ``stop``."""
        one, two, three = self._along((a, b, c), start, stop)
        turns = ((one, two, three), (two, three, one), (three, one, two))
        pairs = [(first, self.along_second(second, third)) for first, second, third in turns]

        def sources(name: str) -> Tensor | None:
            bilinear = [self._bilinear(name, a=first, b=rest) for first, rest in pairs]
            return _sum((*bilinear, self._trilinear(name, one, two, three)))

        return self._arrives(sources, _batch(one, two, three), stop)

    @torch.no_grad()
    def third_adjoint(
        self,
        a: Tensor | Direction,
        b: Tensor | Direction,
        y: Tensor,
        *,
        start: str | None = None,
        stop: str | None = None,
    ) -> Tensor:
        """``u`` with ``<y, D3[a, b, v]> = <u, v>`` for all v."""
        one, two = self._along((a, b), start, stop)
        clean = self._clean_cotangents(y, stop)
        # Cotangents of D2[b, v], which meets a, of D2[a, v], which meets b, and of v itself.
        meets_one, meets_two = (
            self._backward({}, self._curved, partial(self._bilinear_adjoint, a=each, on=clean)) for each in (one, two)
        )
        pairs = ((self.along_second(one, two), clean), (one, meets_two), (two, meets_one))

        def inner(name: str) -> Edges | None:
            bilinear = [self._bilinear_adjoint(name, a=each, on=cotangents) for each, cotangents in pairs]
            return _sum_edges((*bilinear, self._trilinear_adjoint(name, one, two, clean)))

        return self._returns(inner, _batch(one, two, y), start)

    # ---- parts -----------------------------------------------------------------------------------------------------

    @cached_property
    def _curved(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.wiring.steps if not step.node.affine)

    @torch.no_grad()
    def _direction(self, sources: Sources, batch: tuple[int, ...], stop: str) -> Direction:
        self.wiring.require(stop)
        features: dict[str, Any] = {}

        def visit(step: Step, edges: Edges) -> None:
            if not step.node.affine:
                features[step.name] = self.nodes[step.name].features(edges)

        self._forward(sources, (stop,), visit)
        return Direction(features, batch, stop)

    def _along(self, given: Sequence[Tensor | Direction], start: str | None, stop: str | None) -> list[Direction]:
        names, last = self.wiring.names, self._stop(stop)
        self.wiring.require(last)
        found = [d if isinstance(d, Direction) else self.along(d, start=start, stop=last) for d in given]
        for direction in found:
            if names.index(direction.stop) < names.index(last):
                raise InputError(
                    f"a direction was computed up to {direction.stop}, before {last}; compute it up to there"
                )
        return found

    def _clean_cotangents(self, y: Tensor, stop: str | None) -> Mapping[str, Tensor]:
        seeds = {self._stop(stop): y}
        self._checked(seeds)
        return self._backward(seeds, self._curved)

    def _arrives(self, sources: Sources, batch: tuple[int, ...], stop: str | None) -> Tensor:
        target = self._stop(stop)
        return self._filled(self._forward(sources, (target,)), (target,), batch)[target]

    def _returns(self, inner: InnerCotangents, batch: tuple[int, ...], start: str | None) -> Tensor:
        target = self._start(start)
        self.wiring.require(target)
        return self._filled(self._backward({}, (target,), inner), (target,), batch)[target]

    def _bilinear(self, name: str, a: Direction, b: Direction) -> Tensor | None:
        if name not in a.features or name not in b.features:
            return None
        return self.nodes[name].bilinear(a.features[name], b.features[name])

    def _bilinear_adjoint(self, name: str, a: Direction, on: Mapping[str, Tensor]) -> Edges | None:
        if name not in a.features or name not in on:
            return None
        return self.nodes[name].bilinear_adjoint(a.features[name], on[name])

    def _trilinear(self, name: str, *directions: Direction) -> Tensor | None:
        if any(name not in d.features for d in directions):
            return None
        return self.nodes[name].trilinear(*(d.features[name] for d in directions))

    def _trilinear_adjoint(self, name: str, a: Direction, b: Direction, on: Mapping[str, Tensor]) -> Edges | None:
        if name not in a.features or name not in b.features or name not in on:
            return None
        return self.nodes[name].trilinear_adjoint(a.features[name], b.features[name], on[name])


def _batch(*parts: Direction | Tensor) -> tuple[int, ...]:
    shapes = (part.batch if isinstance(part, Direction) else part.shape[:-2] for part in parts)
    return tuple(torch.broadcast_shapes(*shapes))


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) if found else None


def _sum_edges(parts: Sequence[Edges | None]) -> Edges | None:
    found = [part for part in parts if part is not None]
    return tuple(sum(edge[1:], start=edge[0]) for edge in zip(*found, strict=True)) if found else None
