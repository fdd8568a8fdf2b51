"""Norms of a network's exact clean derivative: from the moving tokens, and from every remainder, to one target.

A target is a state, or what the goal counts of the output. Its move is exactly ``J D + sum_m X_m Rem_m`` with the clean
derivatives J from the input and X_m from an additive change of state m (docs/network-certificates.md, section 6).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.normalise import NormaliseBound
from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move
from attnrobust.certify.shared.first_order import ACCURACY as FIRST_ORDER
from attnrobust.certify.shared.first_order import first_order
from attnrobust.certify.shared.head_sizes import spectral_norm
from attnrobust.layers.graph.affine import Affine, Scale
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions
from attnrobust.layers.graph.wiring import Wiring
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.linear_map import (
    LinearMap,
    largest_singular_value_upper,
    pool_rows,
    scale_rows,
    select_tokens,
)
from attnrobust.numerics.rounding import FORMULA, outward
from attnrobust.problem import Problem

DENSE_TARGET, DENSE_NUMBERS = 256, 2**22  # numbers of a target, and of all its derivatives, that are built
PROBES = 4  # random cotangents that estimate how sensitive a target is to each remainder; any weights are sound
ACCURACY, MAX_STEPS = 1e-2, 60  # of a norm; fewer steps only widen it
LARGE = 600  # numbers of the input beyond which the first order of the output is as accurate as the other norms
FLOOR = 1e-3  # smallest estimate, of the largest one
Measured = Callable[[LinearMap], LinearMap]
"""How a map to the whole target is measured: some rows weighted, or pooled."""

TOKENWISE = (Affine, Scale, AddPositions, Activate)


@dataclass(frozen=True, eq=False)
class Tail:
    """Bounds of one target's move from a threat of size 1 and from the remainders of the nodes before it.

    Args:
        first: Move of the target to first order, by a threat of size 1.
        norms: ``||X_m||_2`` of every source, from its weighted remainder; with ``stacked`` the weights omega_m instead.
        rows: Norms of the target's token rows of X_m, (n,), where they were computed.
        stacked: Norm of ``[X_m / omega_m]_m``, all sources at once; None where every norm is known.
        scale: Row factors under which the whole target is measured; None means 1.
    """

    first: StateMove
    norms: Mapping[str, float]
    rows: Mapping[str, Float[Tensor, "n"]]
    stacked: float | None = None
    scale: Float[Tensor, "n"] | None = None

    def move(self, radius: float, remainders: Mapping[str, float]) -> StateMove:
        """Bounds of the target's move on the threat's set of this radius."""
        rest = self._rest(remainders)
        tokens = outward(radius * self.first.tokens + (self._token_rest(remainders) if self.rows else rest), FORMULA)
        whole = outward(radius * self.first.frobenius + rest, FORMULA)
        unknown = tokens.new_full(self.first.entries.shape, math.inf)
        if self.scale is None:
            return state_move(whole, tokens, unknown)
        tokens = tokens / self.scale
        return state_move(whole / float(self.scale.min()), tokens, unknown, scaled=(self.scale, whole))

    def _rest(self, remainders: Mapping[str, float]) -> float:
        sizes = [(value, remainders[name]) for name, value in self.norms.items() if remainders[name] > 0.0]
        if self.stacked is None:
            return math.fsum(norm * size for norm, size in sizes)
        return self.stacked * math.hypot(*(weight * size for weight, size in sizes))

    def _token_rest(self, remainders: Mapping[str, float]) -> Tensor:
        parts = [rows * remainders[name] for name, rows in self.rows.items()]
        found = sum(parts, start=torch.zeros_like(self.first.tokens))
        return torch.nan_to_num(found, nan=torch.inf)


def targets(wiring: Wiring) -> tuple[str, ...]:
    """States whose moves decide the remainders: what curved nodes read, before token-wise maps."""
    steps = {step.name: step for step in wiring.steps}
    found = set()
    for step in wiring.steps:
        for name in step.reads if not step.node.affine else ():
            while name in steps and type(steps[name].node) in TOKENWISE:
                name = steps[name].reads[0]
            found.add(name)
    return tuple(name for name in wiring.names if name in found and name != wiring.source)


def curved_before(wiring: Wiring, target: str) -> tuple[str, ...]:
    """The steps with a remainder that a state depends on, itself included."""
    wanted, kept = {target}, []
    for step in reversed(wiring.steps):
        if step.name in wanted:
            wanted |= set(step.reads)
            kept.append(step)
    return tuple(step.name for step in reversed(kept) if not step.node.affine)


@dataclass(frozen=True, eq=False)
class Tails:
    """Builds the tails of one problem.

    Args:
        problem: The question.
        clean: Its network's derivatives.
        profiles: Weights of the coordinates in which remainders are measured.
        chance: Failure probability of the norms.
    """

    problem: Problem
    clean: Linearisation
    profiles: Mapping[str, Float[Tensor, "n e"]]
    chance: Chance

    def of_state(self, name: str, expected: Mapping[str, float]) -> Tail:
        """The tail of a whole state.

        Args:
            name: The state.
            expected: Sizes of the remainders before it near the radius that will be certified; they choose weights.
        """
        linear, scale, clean = self.clean.linear_map(stop=name), self._scale(name), self.problem.clean
        if self._small(linear, curved_before(self.clean.wiring, name)):
            return self._dense(name, scale)
        factor = self.problem.moves.frobenius_factor(clean.n, clean.width)
        movable = self.problem.moves.movable(clean.n).to(linear.device)

        def measured(whole: LinearMap) -> LinearMap:
            return whole if scale is None else scale_rows(whole, scale)

        size = self._upper(measured(select_tokens(linear, movable))) * factor
        return self._stacked(name, expected, _whole(size, linear), measured, scale)

    def of_output(self, expected: Mapping[str, float], seed: int) -> Tail:
        """The tail of what a displacement counts of the output."""
        pool, linear = self.problem.resolved.weights, self.clean.linear_map()
        accuracy = FIRST_ORDER if linear.in_size <= LARGE else ACCURACY
        found = first_order(self.problem, linear, seed=seed, accuracy=accuracy)
        self.chance.spend(found.failure_probability)
        first = _whole(float(found.slopes[0]), linear)
        return self._stacked(self.clean.wiring.output, expected, first, lambda whole: pool_rows(whole, pool))

    def _scale(self, name: str) -> Float[Tensor, "n"] | None:
        """``s_min / s_i`` where a norm reads the state: what its tokens' moves are worth there; else None."""
        for step in self.clean.wiring.steps:
            if name in step.reads and isinstance(step.node, Normalise):
                spread = NormaliseBound(step.node.norm, self.clean.clean[name]).spread
                return spread.min() / spread
        return None

    def _profiled(self, source: str, change: Tensor) -> Tensor:
        """A change of a state, or a cotangent there, in the coordinates in which its remainder is measured."""
        return change / self.profiles[source] if source in self.profiles else change

    def _small(self, linear: LinearMap, sources: tuple[str, ...]) -> bool:
        size = sum(self.clean.clean[name].numel() for name in sources) + linear.in_size
        return linear.out_size <= DENSE_TARGET and linear.out_size * size <= DENSE_NUMBERS

    def _upper(self, linear: LinearMap) -> float:
        share, seed = self.chance.next_event()
        bound = largest_singular_value_upper(
            linear, failure_probability=share, seed=seed, tol=ACCURACY, max_steps=MAX_STEPS
        )
        self.chance.spend(bound.failure_probability)
        return bound.value

    # ---- small targets: every derivative is built -------------------------------------------------------------------

    def _dense(self, name: str, scale: Float[Tensor, "n"] | None) -> Tail:
        rows, width = (int(size) for size in self.clean.clean[name].shape)
        unit = torch.eye(rows * width, dtype=torch.float64, device=self.clean.clean[name].device)
        unit = unit.reshape(-1, rows, width)
        start, sources = self.clean.wiring.source, curved_before(self.clean.wiring, name)
        pulled = self.clean.pull({name: unit if scale is None else unit * scale[:, None]}, (start, *sources))
        matrices = {source: self._profiled(source, pulled[source]).flatten(1) for source in sources}
        by_row = {source: spectral_norm(matrix.unflatten(0, (rows, width))) for source, matrix in matrices.items()}
        return Tail(
            first=self._first_dense(pulled[start], rows, width),
            norms={source: outward(float(spectral_norm(matrix)), FORMULA) for source, matrix in matrices.items()},
            rows={source: outward(norms, FORMULA) for source, norms in by_row.items()},
            scale=scale,
        )

    def _first_dense(self, jacobian: Float[Tensor, "m n d"], rows: int, width: int) -> StateMove:
        """Whole and rows, each by one norm of all moving tokens and by the sum over tokens."""
        n, d = self.problem.clean.n, self.problem.clean.width
        moves = self.problem.moves
        movable = moves.movable(n).to(jacobian.device)
        frobenius, token = moves.frobenius_factor(n, d), moves.token_factor(n, d)
        moving = jacobian[:, movable].flatten(1)
        blocks = spectral_norm(jacobian.unflatten(0, (rows, width)).permute(0, 2, 1, 3))[:, movable]
        by_norm = spectral_norm(moving.unflatten(0, (rows, width))) * frobenius
        per_token = torch.minimum(by_norm, blocks.sum(dim=-1) * token)
        whole = float(spectral_norm(moving)) * frobenius
        entries = torch.linalg.vector_norm(moving, dim=-1).unflatten(0, (rows, width)) * frobenius
        return state_move(outward(whole, FORMULA), outward(per_token, FORMULA), outward(entries, FORMULA))

    # ---- large targets: one norm of everything stacked ---------------------------------------------------------------

    def _stacked(
        self,
        name: str,
        expected: Mapping[str, float],
        first: StateMove,
        measured: Measured,
        scale: Tensor | None = None,
    ) -> Tail:
        """A tail whose sources share one norm, of the target as it is measured."""
        sources = curved_before(self.clean.wiring, name)
        if not sources:
            return Tail(first, {}, {}, scale=scale)
        plain = dict.fromkeys(sources, 1.0)
        weights = self._weights(measured(self._stack(name, plain)), sources, expected)
        return Tail(first, weights, {}, self._upper(measured(self._stack(name, weights))), scale)

    def _stack(self, name: str, weights: Mapping[str, float]) -> LinearMap:
        """``(t_m)_m -> sum_m X_m t_m / omega_m`` on the flattened sources."""
        shapes = {source: tuple(self.clean.clean[source].shape) for source in weights}
        sizes = [math.prod(shape) for shape in shapes.values()]

        def matvec(flat: Tensor) -> Tensor:
            changes = {
                source: self._profiled(source, part.unflatten(-1, shapes[source])) / weights[source]
                for source, part in zip(weights, flat.split(sizes, dim=-1), strict=True)
            }
            return self.clean.push(changes, (name,))[name]

        def rmatvec(cotangent: Tensor) -> Tensor:
            pulled = self.clean.pull({name: cotangent}, weights)
            parts = (self._profiled(source, pulled[source]) / weight for source, weight in weights.items())
            return torch.cat([part.flatten(-2) for part in parts], dim=-1)

        target = self.clean.clean[name]
        return LinearMap(matvec, rmatvec, (sum(sizes),), tuple(target.shape), target.device)

    def _weights(self, stack: LinearMap, sources: tuple[str, ...], expected: Mapping[str, float]) -> dict[str, float]:
        """``omega_m^2 = ||X_m|| / |Rem_m|`` from estimates of both: then the stack costs at most what the sum does."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(PROBES, *stack.out_shape, generator=generator, dtype=torch.float64).to(stack.device)
        sizes = [self.clean.clean[source].numel() for source in sources]
        lengths = torch.stack([torch.linalg.vector_norm(part) for part in stack.rmatvec(probe).split(sizes, dim=-1)])
        sensitive = _floored(dict(zip(sources, lengths.tolist(), strict=True)))
        rest = _floored({source: expected.get(source, 0.0) for source in sources})
        return {source: math.sqrt(sensitive[source] / rest[source]) for source in sources}


def _floored(values: dict[str, float]) -> dict[str, float]:
    finite = {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
    largest = max(finite.values(), default=0.0) or 1.0
    return {name: max(value / largest, FLOOR) for name, value in finite.items()}


def _whole(size: float, like: LinearMap) -> StateMove:
    """A move of a target of which only the whole is known."""
    rows, width = like.out_shape
    one = torch.full((rows,), size, dtype=torch.float64, device=like.device)
    return state_move(size, one, one[:, None].expand(-1, width))
