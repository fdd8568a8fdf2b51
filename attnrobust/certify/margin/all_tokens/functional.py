"""The trust region of one margin functional, warm-started from radius to radius."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.balance import References, balanced, moments, references, value_at
from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.descent import Descent, detached
from attnrobust.certify.margin.all_tokens.majorant import (
    Coefficients,
    Parameters,
    Pieces,
    assembled,
    coefficients,
    initial_parameters,
    pieces,
)
from attnrobust.certify.margin.quadratic_form import FunctionalRows, QuadraticMajorant
from attnrobust.certify.margin.trust_region import (
    CHOLESKY_LIMIT,
    DECOMPOSE_LIMIT,
    Maximiser,
    Quadratic,
    approximate,
    decomposed_bound,
    factorised_bound,
    iterated_bound,
)
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.numerics.chance import Chance, stream
from attnrobust.numerics.rounding import ENTRY, SMALLEST_UNIT, outward
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import MoveThreat, PerTokenBall

ROUNDS, PATIENCE, PROGRESS = 16, 4, 3e-3  # balances at most; so many without this relative progress end them
STEPS, RATE = 30, 0.06  # of the descent after the balances
WARM_STEPS, WARM_RATE = 4, 0.02  # the same at another radius
TUNING = ((5, 0), (4, 0), (3, 0), (0, 24), (0, 16))  # balances and steps while the radius moves
SHRINK = 0.3  # of the radius where a bound overflows
GROWTH = 1.4  # exponent of a bound in the radius where nothing is known yet
SETTLED = 2e-3  # growth of an approximate value by one more product that ends its search
SHARP = 1e-5  # the same for the best parameters
DENSE_LIMIT = 64  # size up to which an eigenvalue decomposition is also the fastest approximation
STEP, LARGEST_STEP, SMALLEST_STEP = 0.5, 0.8, 0.05  # from the best parameters so far towards the balance
LONGER, SHORTER = 1.25, 0.6  # steps after a better value, after a worse one
MEMORY, MEMORY_NUMBERS = 20, 12_000_000  # reference moves that the balance averages over: fewer, and it oscillates
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


def ellipsoid(threat: MoveThreat, budget: MoveBudget, scale: Float[Tensor, "m _"]) -> Ellipsoid:
    """An ellipsoid around the set (lemma 9 of docs/margin-certificate.md).

    Frobenius ball: itself. Per token: ``sum_j s_j^2 |delta_j|^2 <= eps^2 sum_j s_j^2``, and the same coordinate by
    coordinate for the maximum norm; any positive scale is sound.
    """
    if not isinstance(threat, PerTokenBall):
        return Ellipsoid(torch.ones_like(scale[:, :1]), budget.frobenius)
    return Ellipsoid(scale, outward(budget.epsilon * float(scale.square().sum()) ** 0.5, ENTRY))


@dataclass(eq=False)
class _State:
    """One set, and the best parameters found there."""

    const: Constants
    piece: Pieces
    best: tuple[Quadratic, Maximiser, Parameters, Ellipsoid] | None = None

    @property
    def value(self) -> float:
        """The best approximate bound."""
        return math.inf if self.best is None else self.best[1].value


class FunctionalBound:
    """Bounds of the drop of one functional; parameters and reference moves are kept between radii."""

    def __init__(self, rows: FunctionalRows, threat: MoveThreat, *, chance: Chance) -> None:
        self.rows, self.threat, self.chance = rows, threat, chance
        self.index = rows.rows.index
        self.gradient = rows.gradient[self.index]
        self.parameters: Parameters = initial_parameters(rows)
        self.scale = self._first_scale()
        self.starts: Tensor | None = None
        self.memory: References | None = None
        self.tuned = False

    def _first_scale(self) -> Tensor:
        """Optimal for a linear drop: ``scale^2`` proportional to ``|G|``, by tokens or by coordinates."""
        size = self.gradient.abs()
        if not (isinstance(self.threat, PerTokenBall) and self.threat.norm == "linf"):
            size = torch.linalg.vector_norm(self.gradient, dim=1, keepdim=True)
        size = size + FLOOR * size.mean() + SMALLEST_UNIT
        return (size / size.amax()).sqrt()

    def choose_parameters(
        self, constants_at: Callable[[float], Constants | None], budget: float, radius: float
    ) -> float:
        """Choose parameters while the radius moves to where the bound meets the budget.

        Args:
            constants_at: Constants of a radius; None where they overflow.
            budget: What the functional may drop by.
            radius: Where to start.

        Returns:
            A guess of the certified radius.
        """
        seen: list[tuple[float, float]] = []
        for rounds, steps in TUNING:
            const = constants_at(radius)
            if const is None:
                radius *= SHRINK
                continue
            state = self._state(const)
            self._balance(state, rounds=rounds, patience=rounds)
            self._descend(state, steps=steps, rate=RATE)
            self._solve_again(state)
            radius = self._next_radius(seen, radius, state.value / budget)
            self._keep(state)
        self.tuned = bool(seen)
        return radius

    def _next_radius(self, seen: list[tuple[float, float]], radius: float, usage: float) -> float:
        if not 0.0 < usage < math.inf:
            return radius * SHRINK
        power = GROWTH
        if seen and abs(math.log(seen[-1][0] / radius)) > 0.03:
            power = math.log(usage / seen[-1][1]) / math.log(radius / seen[-1][0])
        seen.append((radius, usage))
        return float(radius * usage ** (-1.0 / min(max(power, 1.0), 3.0)))

    def bound(self, const: Constants) -> Upper:
        """Upper bound of the drop on the set with these constants."""
        state = self._state(const)
        if self.tuned:
            self._descend(state, steps=WARM_STEPS, rate=WARM_RATE)
        else:
            self._balance(state, rounds=ROUNDS, patience=PATIENCE)
            self._descend(state, steps=STEPS, rate=RATE)
        if state.best is None:
            return Upper(math.inf)
        self._solve_again(state)
        self._keep(state)
        quadratic, solution, _, region = state.best
        return self._certified(quadratic, solution, region)

    def _state(self, const: Constants) -> "_State":
        return _State(const, pieces(self.rows, const, self.rows.first_norm))

    def _keep(self, state: "_State") -> None:
        if state.best is None:
            return
        self.tuned = True
        _, _, self.parameters, region = state.best
        if isinstance(self.threat, PerTokenBall):
            self.scale = region.scale

    def _balance(self, state: "_State", *, rounds: int, patience: int) -> None:
        """Alternate between maximisers and balanced parameters."""
        budget = state.const.budget
        par, scale, idle, step = self.parameters, self.scale, 0, STEP
        for _ in range(rounds):
            found = coefficients(self.rows, state.const, state.piece, par)
            solution, progress = self._evaluate(state, found, par, scale)
            if solution is None or state.best is None:
                return
            idle = 0 if progress > PROGRESS else idle + 1
            if idle >= patience:
                return
            region, kept = state.best[3], state.best[2]
            moves = self._moves(solution.points, ellipsoid(self.threat, budget, scale))
            seen = self._remember(moves / budget.frobenius).scaled(budget.frobenius)
            step = min(LARGEST_STEP, LONGER * step) if progress > 0.0 else max(SMALLEST_STEP, SHORTER * step)
            par = balanced(self.rows, state.const, state.piece, kept, seen, step=step)
            scale = self._next_scale(region.scale, moves, budget, 0.5 * step)

    def _descend(self, state: "_State", *, steps: int, rate: float) -> None:
        """Follow the slope of the bound in its parameters."""
        start = (self.parameters, self.scale) if state.best is None else (state.best[2], state.best[3].scale)
        search = Descent(start[0], start[1], steps=steps, rate=rate)
        for _ in search:
            with torch.enable_grad():
                par, scale = search.parameters(), search.scale()
                found = coefficients(self.rows, state.const, state.piece, par)
            solution, _ = self._evaluate(state, found, detached(par), scale.detach())
            if solution is None:
                return
            with torch.enable_grad():
                search.step(self._saddle(state, found, scale, solution))

    def _saddle(self, state: "_State", found: Coefficients, scale: Tensor, solution: Maximiser) -> Tensor:
        """The dual function at fixed maximisers: it has the slope of the bound in the parameters and the scale."""
        budget = state.const.budget
        moves = self._moves(solution.points, ellipsoid(self.threat, budget, scale.detach()))
        with torch.no_grad():
            at = moments(self.rows, moves)
        value = value_at(self.rows, found, at).mean()
        if not isinstance(self.threat, PerTokenBall):
            return value
        square = scale.square()
        spent = (square * moves[:, self.index].square()).sum((-2, -1)).mean()
        return value + 0.5 * solution.multiplier * (budget.epsilon**2 * square.sum() - spent)

    def _solve_again(self, state: "_State") -> None:
        """Solve the best trust region again, more accurately: its value and multiplier came from few products."""
        if state.best is None or state.best[0].gradient.numel() <= DENSE_LIMIT:
            return
        quadratic, solution, par, region = state.best
        solution = approximate(quadratic, region.radius, solution.points[:1], settled=SHARP)
        state.best = (quadratic, solution, par, region)

    def _evaluate(
        self, state: "_State", found: Coefficients, par: Parameters, scale: Tensor
    ) -> tuple[Maximiser | None, float]:
        """Solve the trust region of these parameters; the relative progress over the best so far (at most 1).

        None where the majorant overflowed.
        """
        form = assembled(self.rows, found.detached)
        if not form.finite:
            return None, 0.0
        region = ellipsoid(self.threat, state.const.budget, scale)
        quadratic = self._quadratic(form, region)
        solution = self._approximate(quadratic, region)
        progress = 1.0 if state.best is None else 1.0 - solution.value / state.value
        if state.best is None or solution.value < state.value:
            state.best = (quadratic, solution, par, region)
        return solution, progress

    def _certified(self, quadratic: Quadratic, solution: Maximiser, region: Ellipsoid) -> Upper:
        size = quadratic.gradient.numel()
        if size <= DECOMPOSE_LIMIT:
            return decomposed_bound(quadratic, region.radius)[0]
        if size <= CHOLESKY_LIMIT:
            return factorised_bound(quadratic, region.radius, solution)
        share, seed = self.chance.next_event()
        found = iterated_bound(quadratic, region.radius, solution, failure_probability=share, seed=seed)
        self.chance.spend(found.failure_probability)
        return found

    def _quadratic(self, form: QuadraticMajorant, region: Ellipsoid) -> Quadratic:
        """The majorant in the coordinates ``scale * D`` of the movable tokens."""
        index, shape, scale = self.index, self.rows.rows.points.shape, region.scale

        def product(flat: Tensor) -> Tensor:
            part = flat.reshape(*flat.shape[:-1], -1, shape[1]) / scale
            full = part.new_zeros(*flat.shape[:-1], *shape)
            full[..., index, :] = part
            return (form.apply(full)[..., index, :] / scale).flatten(-2)

        return Quadratic(product, (form.gradient[index] / scale).flatten(), float(form.constant))

    def _approximate(self, quadratic: Quadratic, region: Ellipsoid) -> Maximiser:
        size = quadratic.gradient.numel()
        if size <= DENSE_LIMIT:
            return decomposed_bound(quadratic, region.radius)[1]
        starts = self.starts
        if starts is None:
            generator = torch.Generator().manual_seed(stream(self.chance.seed, self.chance.purpose, "starts"))
            starts = torch.randn(1, size, generator=generator, dtype=torch.float64).to(quadratic.gradient)
        solution = approximate(quadratic, region.radius, starts, settled=SETTLED)
        self.starts = solution.points[:1]
        return solution

    def _moves(self, points: Tensor, region: Ellipsoid) -> Float[Tensor, "b n d"]:
        shape = self.rows.rows.points.shape
        full = points.new_zeros(points.shape[0], *shape)
        full[:, self.index] = points.reshape(points.shape[0], -1, shape[1]) / region.scale
        return full

    def _remember(self, moves: Tensor) -> References:
        new = references(self.rows, moves)
        keep = min(MEMORY, max(4, MEMORY_NUMBERS // self.rows.advantage.numel()))  # each costs (h, n, n) numbers
        self.memory = new if self.memory is None else self.memory.followed_by(new, keep=keep)
        return self.memory

    def _next_scale(self, scale: Tensor, moves: Tensor, budget: MoveBudget, power: float) -> Tensor:
        """Raise the weight of coordinates that leave the set and lower that of unused ones (any weights are sound)."""
        if not isinstance(self.threat, PerTokenBall):
            return scale
        square = moves[:, self.index].square().mean(0)
        if scale.shape[1] == 1:
            square = square.sum(-1, keepdim=True)
        target = budget.epsilon**2
        scale = scale * ((square + SMOOTH * target) / ((1.0 + SMOOTH) * target)) ** power
        return scale / scale.amax()
