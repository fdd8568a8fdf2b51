"""Everything at the clean input that serves every radius, tolerance and goal on the same readout."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnrobust.certify.network.composite.metrics import sampled_metrics
from attnrobust.certify.network.composite.nodes.base import Channel, Form, NodeRemainder
from attnrobust.certify.network.composite.nodes.registry import remainder_of
from attnrobust.certify.network.composite.recursion import Recursion, TargetNorms
from attnrobust.certify.network.composite.second_order import Moves, SecondOrder
from attnrobust.certify.network.composite.sketch import (
    PairSketch,
    Sketch,
    all_pairs,
    basis,
    deflated,
    gaussian,
    gaussian_pairs,
)
from attnrobust.certify.network.composite.targets import Port, Readout, Target
from attnrobust.certify.network.composite.third_order import ThirdOrder
from attnrobust.certify.network.composite.top_eigenvalue import (
    BATCH_NUMBERS,
    Operator,
    top_eigenvalue,
    top_singular_value,
)
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.numerics.chance import MAIN_FAILURE, Chance, stream
from attnrobust.numerics.rounding import SMALLEST

BASIS_LIMIT = 320
"""Numbers that move, up to which sums over all directions are taken over a basis."""
PAIR_LIMIT = 32
"""The same for sums over all pairs of directions."""
ROUGHLY = 0.5  # of an eigenvalue may be given away where a norm is far from what binds
BEND_PAIRS = 512  # pairs for the second order of single features: one sweep, no iteration
LEADING, PILOT, PILOT_ROUNDS = 32, 16, 2
"""Directions that a sketch does not have to stand for, directions of the sketch that finds them, and its iterations."""
SKETCH_SHARE, BEND_SHARE = 0.4, 0.2  # of the failure probability; the rest is for starts of Lanczos
RANGE_NUMBERS = 2**24  # numbers per state that a batch of the range sweep holds


@dataclass(frozen=True, eq=False)
class Settings:
    """How much work a preparation does.

    Args:
        sketch: Gaussian directions where a basis is too large.
        pairs: Gaussian pairs of directions for the third order.
        seed: Of everything random.
        failure: Probability with which any of it may fail.
        readouts: Functionals of the output whose third order is bounded on its own: the classes of a margin.
        own_metrics: Whether remainders are measured in the nodes' own metrics as well: nearly twice the work.
    """

    sketch: int
    pairs: int
    seed: int
    failure: float = MAIN_FAILURE
    readouts: int = 1
    own_metrics: bool = False


class Preparation:
    """Norms of a network's prefix maps at one clean input.

    Args:
        record: The network at the input.
        moves: What may move.
        output: The readout for which metrics are chosen, and which is certified.
        settings: How much work.
    """

    def __init__(self, record: Linearisation, moves: Moves, output: Readout, settings: Settings) -> None:
        self.record, self.moves, self.output, self.settings = record, moves, output, settings
        self.metrics = sampled_metrics(record, moves, output, seed=stream(settings.seed, "metrics"))
        count = len(self.metrics.ports) * (2 if settings.own_metrics else 1)
        events = 4 * count + 4 + settings.readouts
        self._per_sketch = SKETCH_SHARE * settings.failure / events
        self._sketched, self._bent = 0, 0.0
        self._chance = Chance(
            stream(settings.seed, "starts"), "composite", (1.0 - SKETCH_SHARE - BEND_SHARE) * settings.failure,
            expected=7 * count + count * (count + 1) + (count + 3) * settings.readouts,
        )  # fmt: skip

    # ---- what the certificates ask ---------------------------------------------------------------------------------

    @property
    def failure_probability(self) -> float:
        """Of everything that was relied on so far."""
        return self._chance.spent + self._sketched * self._per_sketch + self._bent

    def recursion(self, radius: float) -> Recursion:
        """All ports at one Frobenius radius."""
        return Recursion(self.remainders, self.ports, radius, self.owns)

    @cached_property
    def first(self) -> float:
        """Norm of the first order, from the moves to the readout."""
        return self.norm(
            lambda v: self.output.flat(self._tangents(v, self.output.states)),
            lambda y: self._pulled(self.output.cotangents(y)), self.moves.size, self.output.size,
        )  # fmt: skip

    @cached_property
    def readout(self) -> TargetNorms:
        """Norms of the readout itself."""
        return self.target_norms(self.output)

    @cached_property
    def ports(self) -> dict[str, TargetNorms]:
        """Norms of every port that some curved node comes before."""
        return {port.name: self.target_norms(port) for port in self.metrics.ports if self._second.upstream(port)}

    @cached_property
    def owns(self) -> dict[str, TargetNorms]:
        """The same in the nodes' own metrics, where they have one."""
        if not self.settings.own_metrics:
            return {}
        own = {port: self.remainders[port.name].own_metric() for port in self.metrics.ports if port.name in self.ports}
        return {
            port.name: self.target_norms(Port(port.name, port.reads, port.reads, (None,) * len(scales), scales))
            for port, scales in own.items()
            if scales is not None
        }

    @cached_property
    def remainders(self) -> dict[str, NodeRemainder]:
        """Every node's remainder, its ranges settled."""
        importance = self.metrics.importance
        found = {port.name: remainder_of(self.record, port, importance[port.name]) for port in self.metrics.ports}
        states = sorted({name for port in self.metrics.ports for name in port.reads})
        identity = torch.eye(self.moves.size, dtype=torch.float64, device=self._device)
        for rows in identity.split(self._batch(self.metrics.ports)):
            tangents = self._tangents(rows, states)
            for remainder in found.values():
                remainder.observe(tuple(tangents[name] for name in remainder.port.reads))
        self._bend(found)
        for remainder in found.values():
            remainder.settle()
            self._sharpen(remainder)
        return found

    def _bend(self, remainders: Mapping[str, NodeRemainder]) -> None:
        """Half the Frobenius norm of every feature's second derivative, from pairs of directions."""
        ports = [remainder.port for remainder in remainders.values() if self.upstream(remainder.port)]
        if not ports:
            return
        features = sum(remainder.features for remainder in remainders.values())
        failure = BEND_SHARE * self.settings.failure
        pairs = self._pairs("bends", BEND_PAIRS, failure / features)
        self._bent += failure if pairs.failure > 0.0 else 0.0
        form = ThirdOrder(self.record, self.moves, (pairs.first, pairs.second))
        step, factor = self._batch(ports), 0.5 * math.sqrt(pairs.inflation)
        for start in range(0, pairs.first.shape[0], step):
            for port, edges in form.seconds(ports, slice(start, start + step)).items():
                remainders[port.name].observe_second(tuple(factor * edge for edge in edges))

    def _batch(self, ports: Sequence[Port]) -> int:
        """Directions of a sweep that collects features at once."""
        largest = max(int(self.record.clean[name].numel()) for port in ports for name in port.reads)
        return max(1, RANGE_NUMBERS // largest)

    # ---- norms -----------------------------------------------------------------------------------------------------

    def norm(
        self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], size: int, out_size: int
    ) -> float:
        """Upper bound of the norm of a map by its products, on its smaller side."""
        weight = 2 * max(int(value.numel()) for value in self.record.clean.values())
        if size <= out_size:
            operator = Operator(lambda v: backward(forward(v)), size, weight)
        else:
            operator = Operator(lambda y: forward(backward(y)), out_size, weight)
        return top_singular_value(operator, self._chance, device=self._device)

    def target_norms(self, target: Target) -> TargetNorms:
        """Curvature, cross terms and tails of one target."""
        upstream = self._second.upstream(target)
        sources = [port for port in upstream if self._second.upstream(port)]
        return TargetNorms(
            curvature=self._sketched_norm(self._second.curvature(target)),
            third=self.third_norm(target),
            cross=self._sketched_norm(self._second.cross(target, sources)) if sources else 0.0,
            sources=tuple(port.name for port in sources),
            tails=self.tails(target),
        )

    def upstream(self, target: Target) -> list[Port]:
        """The curved nodes before a target."""
        return self._second.upstream(target)

    def tails(self, target: Target) -> dict[tuple[str, str], float]:
        """Norms from every channel of the nodes before a target to it."""
        return {
            (port.name, name): self._tail(port.name, channel, target)
            for port in self.upstream(target)
            for name, channel in self.remainders[port.name].channels.items()
        }

    def top(self, product: Callable[[Tensor], Tensor]) -> float:
        """Upper bound of the largest eigenvalue, or 0, of a symmetric map of moves."""
        weight = 4 * max(int(value.numel()) for value in self.record.clean.values())
        return top_eigenvalue(Operator(product, self.moves.size, weight), self._chance, device=self._device)

    def _sketched_norm(self, operator: Operator) -> float:
        return self._use(self._sketch) * top_singular_value(operator, self._chance, device=self._device)

    def third_norm(self, target: Target) -> float:
        """``sup |D3[D, D, D]|`` over moves of norm 1, at most."""
        top = top_singular_value(self._third.curvature(target), self._chance, device=self._device, tolerance=ROUGHLY)
        return self._use(self._third_pairs) * top

    def _use(self, sketch: Sketch | PairSketch) -> float:
        """The factor of one use of a sketch, which is recorded."""
        self._sketched += 1 if sketch.failure > 0.0 else 0
        return math.sqrt(sketch.inflation)

    def _tail(self, node: str, channel: Channel, target: Target) -> float:
        def forward(t: Tensor) -> Tensor:
            source = channel.emit(t.unflatten(-1, channel.shape))
            return target.flat(self.record.push({node: source}, target.states))

        def backward(y: Tensor) -> Tensor:
            cotangent = self.record.pull(target.cotangents(y), (node,))[node]
            return channel.absorb(cotangent).flatten(-len(channel.shape))

        return self.norm(forward, backward, math.prod(channel.shape), target.size)

    # ---- parts -----------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.moves.movable.device

    @cached_property
    def _sketch(self) -> Sketch:
        sketch = self._directions(self.moves.size, "moves")
        return sketch if sketch.failure == 0.0 else deflated(sketch, self._leading)

    @cached_property
    def _leading(self) -> Tensor:
        """Orthonormal moves in which the second order is large, from a sketch of their own; any are sound."""
        size, device = self.moves.size, self._device
        pilot = gaussian(size, PILOT, failure=0.5, seed=stream(self.settings.seed, "pilot"), device=device)
        form = SecondOrder(self.record, self.moves, self.metrics.ports, pilot.directions).curvature(self.output)
        generator = torch.Generator().manual_seed(stream(self.settings.seed, "leading"))
        found = torch.randn(LEADING, size, generator=generator, dtype=torch.float64).to(device)
        chunk = max(1, BATCH_NUMBERS // form.weight)
        for _ in range(PILOT_ROUNDS):
            found = torch.cat([form.product(rows) for rows in found.split(chunk)])
            found = torch.linalg.qr(found.T / found.abs().amax().clamp_min(SMALLEST)).Q.T
        return found

    @cached_property
    def _third_pairs(self) -> PairSketch:
        return self._pairs("third", self.settings.pairs, self._per_sketch)

    @cached_property
    def _third(self) -> ThirdOrder:
        return ThirdOrder(self.record, self.moves, (self._third_pairs.first, self._third_pairs.second))

    def _pairs(self, purpose: str, count: int, failure: float) -> PairSketch:
        if self.moves.size <= PAIR_LIMIT:
            return all_pairs(self.moves.size, self._device)
        seed = stream(self.settings.seed, "pairs", purpose)
        return gaussian_pairs(self.moves.size, count, failure=failure, seed=seed, device=self._device)

    def _directions(self, size: int, purpose: str) -> Sketch:
        if size <= max(BASIS_LIMIT, self.settings.sketch):
            return basis(size, self._device)
        seed = stream(self.settings.seed, "sketch", purpose)
        return gaussian(size, self.settings.sketch, failure=self._per_sketch, seed=seed, device=self._device)

    @cached_property
    def _second(self) -> SecondOrder:
        return SecondOrder(self.record, self.moves, self.metrics.ports, self._sketch.directions)

    def _tangents(self, flat: Tensor, states: Sequence[str]) -> dict[str, Tensor]:
        return self.record.push({self.record.wiring.source: self.moves.tokens(flat)}, states)

    def _pulled(self, cotangents: dict[str, Tensor]) -> Tensor:
        source = self.record.wiring.source
        return self.moves.flat(self.record.pull(cotangents, (source,))[source])

    def _sharpen(self, remainder: NodeRemainder) -> None:
        """Joint norm of the features, and the norm of the node's own second derivative."""
        port, channel = remainder.port, remainder.curved()
        for name, form in remainder.forms.items():
            remainder.joints[name] = self._joint(port.reads[0], form)
        if channel is not None and self.upstream(port):
            remainder.kappa = self._own_curvature(port, channel)

    def _joint(self, state: str, form: Form) -> float:
        def forward(v: Tensor) -> Tensor:
            return form.forward((self._tangents(v, (state,))[state],))

        def backward(y: Tensor) -> Tensor:
            (edge,) = form.backward(y)
            return self._pulled({state: edge})

        features = int(form.forward((torch.zeros_like(self.record.clean[state]),)).numel())
        return self.norm(forward, backward, self.moves.size, features)

    def _own_curvature(self, port: Port, channel: Channel) -> float:
        """``sup ||f''[R, .]||_F`` in a channel over remainders of metric norm 1."""
        state, sketch = self.record.nodes[port.name], self._directions(port.size, port.name)
        mine = state.features(port.edges(sketch.directions))

        def product(v: Tensor) -> Tensor:
            image = channel.emit(state.bilinear(mine, state.features(port.edges(v[:, None]))))
            return port.flat_cotangent(state.bilinear_adjoint(mine, channel.absorb(image))).sum(1)

        weight = 4 * sketch.directions.shape[0] * max(port.size, math.prod(channel.shape))
        operator = Operator(product, port.size, weight)
        return self._use(sketch) * top_singular_value(operator, self._chance, device=self._device)
