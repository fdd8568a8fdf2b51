"""Norms of a network's exact clean derivative: from the moving tokens, and from every remainder, to one target.

A target is a state, or what the goal counts of the output. Its move is exactly ``J D + sum_m X_m Rem_m`` with the clean
derivatives J from the input and X_m from an additive change of state m (docs/network-certificates.md, section 6).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.node_bounds.state_move import StateMove, state_move
from attnrobust.certify.shared.first_order import first_order
from attnrobust.certify.shared.head_sizes import spectral_norm
from attnrobust.layers.graph.affine import Affine, Scale
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.rows import AddPositions
from attnrobust.layers.graph.wiring import Wiring
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.linear_map import (
    LinearMap,
    largest_singular_value_upper,
    pool_rows,
    select_tokens,
)
from attnrobust.numerics.rounding import FORMULA, outward
from attnrobust.problem import Problem

DENSE_TARGET, DENSE_NUMBERS = 256, 2**22  # numbers of a target, and of all its derivatives, that are built
PROBES = 4  # random cotangents that estimate how sensitive a target is to each remainder; any weights are sound
ACCURACY = 1e-2  # of the stacked norms
FLOOR = 1e-3  # smallest estimate, of the largest one
TOKENWISE = (Affine, Scale, AddPositions, Activate)


@dataclass(frozen=True, eq=False)
class Tail:
    """Bounds of one target's move from a threat of size 1 and from the remainders of the nodes before it.

    Args:
        first: Move of the target to first order, by a threat of size 1.
        norms: ``||X_m||_2`` of every source; with ``stacked`` the weights omega_m instead.
        rows: Norms of the target's token rows of X_m, (n,), where they were computed.
        stacked: Norm of ``[X_m / omega_m]_m``, all sources at once; None where every norm is known.
    """

    first: StateMove
    norms: Mapping[str, float]
    rows: Mapping[str, Float[Tensor, "n"]]
    stacked: float | None = None

    def move(self, radius: float, remainders: Mapping[str, StateMove]) -> StateMove:
        """Bounds of the target's move on the threat's set of this radius."""
        rest = self._rest(remainders)
        tokens = radius * self.first.tokens + (self._token_rest(remainders) if self.rows else rest)
        whole = outward(radius * self.first.frobenius + rest, FORMULA)
        return state_move(whole, outward(tokens, FORMULA), tokens.new_full(self.first.entries.shape, math.inf))

    def _rest(self, remainders: Mapping[str, StateMove]) -> float:
        sizes = {name: (value, remainders[name].frobenius) for name, value in self.norms.items()}
        if self.stacked is None:
            return sum(norm * size for norm, size in sizes.values() if size > 0.0)
        return self.stacked * math.sqrt(sum((weight * size) ** 2 for weight, size in sizes.values() if size > 0.0))

    def _token_rest(self, remainders: Mapping[str, StateMove]) -> Tensor:
        parts = [rows * remainders[name].frobenius for name, rows in self.rows.items()]
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
        chance: Failure probability of the norms.
    """

    problem: Problem
    clean: Linearisation
    chance: Chance

    def of_state(self, name: str, expected: Mapping[str, float]) -> Tail:
        """The tail of a whole state.

        Args:
            name: The state.
            expected: Sizes of the remainders before it near the radius that will be certified; they choose weights.
        """
        sources = curved_before(self.clean.wiring, name)
        linear = self.clean.linear_map(stop=name)
        if self._small(linear, sources):
            return self._dense(name, sources)
        movable = self.problem.moves.movable(self.problem.clean.n).to(linear.device)
        clean = self.problem.clean
        factor = self.problem.moves.frobenius_factor(clean.n, clean.width)
        first = self._upper(select_tokens(linear, movable)) * factor
        rows, width = self.clean.clean[name].shape
        return self._stacked(name, sources, expected, _whole(first, int(rows), int(width), like=linear), pool=None)

    def of_output(self, expected: Mapping[str, float], seed: int) -> Tail:
        """The tail of what a displacement counts of the output."""
        pool, name = self.problem.resolved.weights, self.clean.wiring.output
        linear = self.clean.linear_map()
        found = first_order(self.problem, linear, seed=seed)
        self.chance.spend(found.failure_probability)
        rows, width = self.clean.clean[name].shape
        shape = (int(rows) if pool is None else 1, int(width))
        first = _whole(float(found.slopes[0]), *shape, like=linear)
        return self._stacked(name, curved_before(self.clean.wiring, name), expected, first, pool=pool)

    def _small(self, linear: LinearMap, sources: tuple[str, ...]) -> bool:
        size = sum(self.clean.clean[name].numel() for name in sources) + linear.in_size
        return linear.out_size <= DENSE_TARGET and linear.out_size * size <= DENSE_NUMBERS

    def _upper(self, linear: LinearMap) -> float:
        share, seed = self.chance.next_event()
        bound = largest_singular_value_upper(linear, failure_probability=share, seed=seed, tol=ACCURACY)
        self.chance.spend(bound.failure_probability)
        return bound.value

    # ---- small targets: every derivative is built -------------------------------------------------------------------

    def _dense(self, name: str, sources: tuple[str, ...]) -> Tail:
        rows, width = (int(size) for size in self.clean.clean[name].shape)
        unit = torch.eye(rows * width, dtype=torch.float64, device=self.clean.clean[name].device)
        start = self.clean.wiring.source
        pulled = self.clean.pull({name: unit.reshape(-1, rows, width)}, (start, *sources))
        matrices = {source: value.flatten(1) for source, value in pulled.items() if source != start}
        return Tail(
            first=self._first_dense(pulled[start], rows, width),
            norms={source: outward(float(spectral_norm(matrix)), FORMULA) for source, matrix in matrices.items()},
            rows={
                source: outward(spectral_norm(matrix.unflatten(0, (rows, width))), FORMULA)
                for source, matrix in matrices.items()
            },
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
        sources: tuple[str, ...],
        expected: Mapping[str, float],
        first: StateMove,
        pool: Float[Tensor, "n"] | None,
    ) -> Tail:
        if not sources:
            return Tail(first, {}, {})
        weights = self._weights(name, sources, expected, pool)
        norm = self._upper(pool_rows(self._stack(name, weights), pool))
        return Tail(first, weights, {}, stacked=norm)

    def _stack(self, name: str, weights: Mapping[str, float]) -> LinearMap:
        """``(t_m)_m -> sum_m X_m t_m / omega_m`` on the flattened sources."""
        shapes = {source: tuple(self.clean.clean[source].shape) for source in weights}
        sizes = [math.prod(shape) for shape in shapes.values()]

        def matvec(flat: Tensor) -> Tensor:
            parts = flat.split(sizes, dim=-1)
            changes = {
                source: part.unflatten(-1, shapes[source]) / weights[source]
                for source, part in zip(weights, parts, strict=True)
            }
            return self.clean.push(changes, (name,))[name]

        def rmatvec(cotangent: Tensor) -> Tensor:
            pulled = self.clean.pull({name: cotangent}, weights)
            return torch.cat([pulled[source].flatten(-2) / weights[source] for source in weights], dim=-1)

        target = self.clean.clean[name]
        return LinearMap(matvec, rmatvec, (sum(sizes),), tuple(target.shape), target.device)

    def _weights(
        self, name: str, sources: tuple[str, ...], expected: Mapping[str, float], pool: Float[Tensor, "n"] | None
    ) -> dict[str, float]:
        """``omega_m^2 = ||X_m|| / |Rem_m|`` from estimates of both: then the stack costs at most what the sum does."""
        generator = torch.Generator().manual_seed(self.chance.seed % 2**62)
        target = self.clean.clean[name]
        shape = (PROBES, *target.shape) if pool is None else (PROBES, 1, target.shape[1])
        probe = torch.randn(shape, generator=generator, dtype=torch.float64).to(target)
        if pool is not None:
            probe = pool[:, None] * probe
        pulled = self.clean.pull({name: probe}, sources)
        sensitive = _floored({source: float(torch.linalg.vector_norm(pulled[source])) for source in sources})
        sizes = _floored({source: expected.get(source, 0.0) for source in sources})
        return {source: math.sqrt(sensitive[source] / sizes[source]) for source in sources}


def _floored(values: dict[str, float]) -> dict[str, float]:
    finite = {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
    largest = max(finite.values(), default=0.0) or 1.0
    return {name: max(value / largest, FLOOR) for name, value in finite.items()}


def _whole(size: float, rows: int, width: int, *, like: LinearMap) -> StateMove:
    one = torch.full((rows,), size, dtype=torch.float64, device=like.device)
    return state_move(size, one, one[:, None].expand(-1, width))
