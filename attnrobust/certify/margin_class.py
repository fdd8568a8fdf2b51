"""The trust region of one margin functional, warm-started from radius to radius."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.bounds import Upper
from attnrobust.certify.margin_constants import Budget, Constants
from attnrobust.certify.margin_form import ClassRows
from attnrobust.certify.margin_majorant import Parameters, Pieces, balanced, initial_parameters, majorant, pieces
from attnrobust.certify.margin_trust_region import (
    CHOLESKY_LIMIT,
    DECOMPOSE_LIMIT,
    Maximiser,
    Quadratic,
    approximate,
    decomposed_bound,
    factorised_bound,
    iterated_bound,
)
from attnrobust.threat import PerTokenBall, Threat

ROUNDS, FIRST_ROUNDS = 16, 40  # balances of the parameters at one radius at most; more before there are good ones
PATIENCE, FIRST_PATIENCE, PROGRESS = 4, 6, 3e-3  # rounds without this relative progress end the search
FIRST_NUMBERS = 60_000  # rows times tokens up to which the first rounds are that many
STEP, LARGEST_STEP, SMALLEST_STEP = 0.5, 0.8, 0.05  # from the best parameters so far towards the balance
LONGER, SHORTER = 1.25, 0.6  # steps after a better value, after a worse one
MEMORY, MEMORY_NUMBERS = 20, 30_000_000  # reference moves that the balance averages over: fewer, and it oscillates
FLOOR = 0.5  # share of the mean that is added to the first weights
SMOOTH = 0.1  # share of the budget below which a coordinate's weight does not fall


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """``{||scale * D||_F <= radius}``, a superset of the perturbation set; D on the movable tokens, (m, d).

    Args:
        scale: Positive, (m, 1) or (m, d).
        radius: Its size.
    """

    scale: Float[Tensor, "m _"]
    radius: float


def ellipsoid(threat: Threat, budget: Budget, scale: Float[Tensor, "m _"]) -> Ellipsoid:
    """An ellipsoid around the set (lemma 9 of docs/margin-certificate.md).

    Frobenius ball: itself. Per token: ``sum_j s_j^2 |delta_j|^2 <= eps^2 sum_j s_j^2``, and the same coordinate by
    coordinate for the maximum norm; any positive scale is sound.
    """
    if not isinstance(threat, PerTokenBall):
        return Ellipsoid(torch.ones_like(scale[:, :1]), budget.frobenius)
    return Ellipsoid(scale, budget.epsilon * float(scale.square().sum()) ** 0.5 * (1.0 + 1e-12))


class ClassBound:
    """Bounds of the drop of one functional; parameters and reference moves are kept between radii."""

    def __init__(self, rows: ClassRows, threat: Threat, *, seed: int) -> None:
        self.rows, self.threat, self.seed = rows, threat, seed
        self.index = rows.rows.index
        self.gradient = rows.gradient[self.index]
        self.parameters: Parameters = initial_parameters(rows)
        self.scale = self._first_scale()
        self.top: Tensor | None = None
        self.memory: Tensor | None = None
        self.count = 0

    def _first_scale(self) -> Tensor:
        """Optimal for a linear drop: ``scale^2`` proportional to ``|G|``, by tokens or by coordinates."""
        size = self.gradient.abs()
        if not (isinstance(self.threat, PerTokenBall) and self.threat.norm == "linf"):
            size = torch.linalg.vector_norm(self.gradient, dim=1, keepdim=True)
        size = size + FLOOR * size.mean() + 1e-100
        return (size / size.amax()).sqrt()

    def bound(self, const: Constants, *, failure_probability: float) -> Upper:
        """Upper bound of the drop on the set.

        Args:
            const: Constants of the set.
            failure_probability: What one random start may fail with; 0 refuses them (the bound is then infinite).
        """
        piece = pieces(self.rows, const, self.rows.first_norm)
        par, scale = self.parameters, self.scale
        best: tuple[Quadratic, Maximiser, Parameters, Ellipsoid] | None = None
        idle, step = 0, STEP
        first = self.memory is None and self.rows.advantage.numel() <= FIRST_NUMBERS
        rounds, patience = (FIRST_ROUNDS, FIRST_PATIENCE) if first else (ROUNDS, PATIENCE)
        for _ in range(rounds):
            region = ellipsoid(self.threat, const.budget, scale)
            quadratic = self._quadratic(const, piece, par, region)
            solution = self._approximate(quadratic, region)
            self.top = solution.top
            idle = 0 if best is None or solution.value < (1.0 - PROGRESS) * best[1].value else idle + 1
            if best is None or solution.value < best[1].value:
                best = (quadratic, solution, par, region)
            if idle >= patience:
                break
            moves = self._moves(solution.points, region)
            seen = self._remember(moves / const.budget.frobenius)
            longer = solution is best[1]
            step = min(LARGEST_STEP, LONGER * step) if longer else max(SMALLEST_STEP, SHORTER * step)
            par = balanced(self.rows, const, piece, best[2], const.budget.frobenius * seen, step=step)
            scale = self._next_scale(best[3].scale, moves, const.budget, 0.5 * step)
        assert best is not None  # noqa: S101 - there is at least one round
        quadratic, solution, self.parameters, region = best
        self.top, self.scale = solution.top, (scale if not isinstance(self.threat, PerTokenBall) else region.scale)
        return self._certified(quadratic, solution, region, failure_probability)

    def _certified(
        self, quadratic: Quadratic, solution: Maximiser, region: Ellipsoid, failure_probability: float
    ) -> Upper:
        size = quadratic.gradient.numel()
        if size <= DECOMPOSE_LIMIT:
            return decomposed_bound(quadratic, region.radius)[0]
        if size <= CHOLESKY_LIMIT:
            return factorised_bound(quadratic, region.radius, solution)
        if failure_probability <= 0.0:
            return Upper(torch.inf)
        self.count += 1
        return iterated_bound(
            quadratic, region.radius, solution, failure_probability=failure_probability,
            seed=self.seed + 7919 * self.count,
        )  # fmt: skip

    def _quadratic(self, const: Constants, piece: Pieces, par: Parameters, region: Ellipsoid) -> Quadratic:
        """The majorant in the coordinates ``scale * D`` of the movable tokens."""
        form = majorant(self.rows, const, piece, par)
        index, shape, scale = self.index, self.rows.rows.points.shape, region.scale

        def product(flat: Tensor) -> Tensor:
            part = flat.reshape(*flat.shape[:-1], -1, shape[1]) / scale
            full = part.new_zeros(*flat.shape[:-1], *shape)
            full[..., index, :] = part
            return (form.apply(full)[..., index, :] / scale).flatten(-2)

        return Quadratic(product, (form.gradient[index] / scale).flatten(), form.constant)

    def _approximate(self, quadratic: Quadratic, region: Ellipsoid) -> Maximiser:
        if quadratic.gradient.numel() <= DECOMPOSE_LIMIT:
            return decomposed_bound(quadratic, region.radius)[1]
        start = self.top
        if start is None:
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.randn(quadratic.gradient.numel(), generator=generator, dtype=torch.float64)
        return approximate(quadratic, region.radius, start.to(quadratic.gradient))

    def _moves(self, points: Tensor, region: Ellipsoid) -> Float[Tensor, "b n d"]:
        shape = self.rows.rows.points.shape
        full = points.new_zeros(points.shape[0], *shape)
        full[:, self.index] = points.reshape(points.shape[0], -1, shape[1]) / region.scale
        return full

    def _remember(self, moves: Tensor) -> Tensor:
        old = moves[:0] if self.memory is None else self.memory
        keep = min(MEMORY, max(4, MEMORY_NUMBERS // self.rows.advantage.numel()))  # each costs (h, n, n) numbers
        self.memory = torch.cat([old, moves])[-keep:]
        return self.memory

    def _next_scale(self, scale: Tensor, moves: Tensor, budget: Budget, power: float) -> Tensor:
        """Raise the weight of coordinates that leave the set and lower that of unused ones (any weights are sound)."""
        if not isinstance(self.threat, PerTokenBall):
            return scale
        square = moves[:, self.index].square().mean(0)
        if scale.shape[1] == 1:
            square = square.sum(-1, keepdim=True)
        target = budget.epsilon**2
        scale = scale * ((square + SMOOTH * target) / ((1.0 + SMOOTH) * target)) ** power
        return scale / scale.amax()
