"""The search of one functional's parameters and radius. Nothing is claimed: float32, few products, estimates."""

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.balance import References, balanced, moments, references, value_at
from attnrobust.certify.margin.all_tokens.choice import Choice
from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.descent import Descent, detached
from attnrobust.certify.margin.all_tokens.estimates import ConstantsCurve, RunningSpread, cast, lowered
from attnrobust.certify.margin.all_tokens.majorant import (
    Coefficients,
    Parameters,
    Pieces,
    Spread,
    assembled,
    coefficients,
    exact_spread,
    initial_parameters,
    pieces,
)
from attnrobust.certify.margin.all_tokens.region import Coordinates, Ellipsoid, ellipsoid
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.certify.margin.trust_region import Maximiser, Quadratic, approximate, decomposed_bound, followed
from attnrobust.numerics.chance import stream
from attnrobust.numerics.rounding import SMALLEST_UNIT
from attnrobust.threats.moves import MoveThreat, PerTokenBall

TUNING = ((5, 0), (4, 0), (3, 0), (0, 24), (0, 36))  # balances and steps while the radius moves
ROUNDS, STEPS, RATE = 12, 30, 0.06  # balances and steps at a radius that is given
AGAIN_STEPS, AGAIN_RATE = 4, 0.02  # steps at another radius
MORE, FAR = 3, 0.25  # times that the last of them is done again while the logarithm of the used share is so large
NEAR = 0.15  # of the logarithm of a radius: so near no further step is worth its time
SHRINK = 0.3  # of the radius where a bound overflows
LONGEST = 1.6  # factor by which a radius grows at once
GROWTH = 1.4  # exponent of a bound in the radius where nothing is known yet
EXPONENTS = (1.2, 6.0)
PREDICTIONS = 6  # evaluations at most that predict the radius
CLOSE = 3e-3  # distance of a used share from 1 that ends them
FOLLOWED = 3  # last maximisers that span where the next one is looked for
EXPANSIONS, LAST_EXPANSIONS = 4, 16  # of that span in a solve, in one that predicts
EXCESS = 9e-3  # of a proof's bound of the largest eigenvalue over what a search finds
SETTLED, SHARP = 1e-3, 5e-5  # growth of a value by one expansion that ends a solve, one that predicts
FIRST_PRODUCTS = 8  # of the first solve
DENSE_LIMIT = 64  # size up to which an eigenvalue decomposition is also the fastest approximation
STEP, LARGEST_STEP, SMALLEST_STEP = 0.5, 0.8, 0.05  # from the best parameters so far towards the balance
LONGER, SHORTER = 1.25, 0.6  # steps after a better value, after a worse one
MEMORY, MEMORY_NUMBERS = 20, 12_000_000  # reference moves that the balance averages over: fewer, and it oscillates
FLOOR = 0.5  # share of the mean that is added to the first weights
SMOOTH = 0.1  # share of the budget below which a coordinate's weight does not fall


@dataclass(frozen=True, eq=False)
class _Found:
    """One evaluation: the approximate value of the bound at some parameters."""

    solution: Maximiser
    parameters: Parameters
    scale: Tensor
    moves: Tensor
    starts: Tensor


@dataclass(eq=False)
class _Stage:
    """One radius, and the best parameters found there."""

    const: Constants
    piece: Pieces
    spread: Spread
    best: _Found | None = None

    @property
    def value(self) -> float:
        return math.inf if self.best is None else self.best.solution.value


class DropSearch:
    """Parameters of the majorant of one functional, kept from radius to radius."""

    def __init__(
        self, rows: FunctionalRows, threat: MoveThreat, *, seed: int, coordinates: Coordinates | None = None
    ) -> None:
        self.full, self.rows, self.threat, self.seed = rows, lowered(rows), threat, seed
        self.coordinates = coordinates or Coordinates(rows.rows)
        self.parameters = initial_parameters(self.rows)
        self.scale = _first_scale(self.coordinates.taken(self.rows.gradient), threat)
        self.starts: Tensor | None = None
        self.memory: References | None = None
        self.spread = RunningSpread()
        self.radius: float | None = None  # where the parameters were chosen
        self.growth = GROWTH

    @property
    def choice(self) -> Choice:
        """The parameters at hand."""
        return Choice(self.parameters, self.scale, self.starts).admissible

    def choose(self, curve: ConstantsCurve, budget: float, radius: float, *, aim: float) -> float:
        """Choose parameters while the radius moves to where the bound meets the budget.

        Args:
            curve: Constants of a radius.
            budget: What the functional may drop by.
            radius: Where to start.
            aim: Share of the budget that the bound may use.

        Returns:
            A guess of the certified radius.
        """
        seen: list[tuple[float, float]] = []
        for stage, (rounds, steps) in enumerate(TUNING + MORE * TUNING[-1:]):
            if stage >= len(TUNING) and seen and abs(math.log(seen[-1][1])) < FAR:
                break
            const = curve(radius) if stage < len(TUNING) - 1 else curve.known(radius)
            if const is None:
                radius *= SHRINK
                continue
            self._tune(const, rounds=rounds, steps=steps, rate=RATE)
            radius = self._next_radius(seen, radius, self._value(const) / (aim * budget))
        seen = seen[-1:]  # values with the same parameters
        for _ in range(PREDICTIONS):
            const = curve(radius)
            used = math.inf if const is None else self._value(const) / (aim * budget)
            if const is None or not 0.0 < used < math.inf:
                return radius * SHRINK
            radius = self._next_radius(seen, radius, used)
            if abs(math.log(used)) < CLOSE:
                break
        return radius

    def is_below(self, curve: ConstantsCurve, budget: float, radius: float) -> bool:
        """Whether a few balances make the bound at a radius smaller than this; False at infinity."""
        const = curve(radius) if radius < math.inf else None
        if const is None:
            return False
        self._tune(const, rounds=TUNING[0][0], steps=0, rate=RATE)
        return self._value(const) < budget

    def at(self, const: Constants) -> Choice:
        """Parameters for a set: those at hand where they were chosen nearby."""
        radius = const.budget.epsilon
        if self.radius is None:
            self._tune(const, rounds=ROUNDS, steps=STEPS, rate=RATE)
        elif abs(math.log(radius / self.radius)) > NEAR:
            self._tune(const, rounds=0, steps=AGAIN_STEPS, rate=AGAIN_RATE)
        return self.choice

    def _tune(self, const: Constants, *, rounds: int, steps: int, rate: float) -> None:
        """Better parameters at one radius; in float64 where float32 leaves its range."""
        stage = self._stage(const)
        done = self._balance(stage, rounds=rounds) and self._descend(stage, steps=steps, rate=rate)
        if not done and self.rows is not self.full:
            self._raise_precision()
            stage = self._stage(const)
            done = self._balance(stage, rounds=rounds) and self._descend(stage, steps=steps, rate=rate)
        if stage.best is not None:
            self.parameters, self.scale = stage.best.parameters, stage.best.scale
            self.starts, self.radius = stage.best.starts, const.budget.epsilon

    def _raise_precision(self) -> None:
        self.rows = self.full
        values = {field.name: getattr(self.parameters, field.name).double() for field in fields(self.parameters)}
        self.parameters, self.scale = Parameters(**values), self.scale.double()
        self.starts, self.memory, self.spread = None, None, RunningSpread()

    def _stage(self, const: Constants) -> _Stage:
        const = cast(const, self.rows.gamma.dtype)
        return _Stage(const, pieces(self.rows, const, self.rows.first_norm), self.spread)

    def _value(self, const: Constants) -> float:
        """What a proof with the parameters at hand will give, roughly."""
        stage = replace(self._stage(const), spread=exact_spread)
        found = self._coefficients(stage, self.parameters)
        evaluated = self._evaluate(stage, found, self.parameters, self.scale, expansions=LAST_EXPANSIONS)
        if evaluated is None:
            return math.inf
        solution, size = evaluated.solution, ellipsoid(self.threat, const.budget, self.scale).radius
        above = max((1.0 + EXCESS) * solution.top - solution.multiplier, 0.0)
        return solution.value + 0.5 * above * size**2

    def _next_radius(self, seen: list[tuple[float, float]], radius: float, usage: float) -> float:
        if not 0.0 < usage < math.inf:
            return radius * SHRINK
        if seen and abs(math.log(seen[-1][0] / radius)) > 0.03:
            power = math.log(usage / seen[-1][1]) / math.log(radius / seen[-1][0])
            self.growth = min(max(power, EXPONENTS[0]), EXPONENTS[1])
        seen.append((radius, usage))
        return radius * min(math.pow(usage, -1.0 / self.growth), LONGEST)

    def _balance(self, stage: _Stage, *, rounds: int) -> bool:
        """Alternate between maximisers and balanced parameters; False where a number left its range."""
        budget = stage.const.budget
        par, scale, step = self.parameters, self.scale, STEP
        for _ in range(rounds):
            before = stage.value
            found = self._evaluate(stage, self._coefficients(stage, par), par, scale)
            if found is None or stage.best is None:
                return False
            seen = self._remember(found.moves / budget.frobenius).scaled(budget.frobenius)
            better = found.solution.value < before
            step = min(LARGEST_STEP, LONGER * step) if better else max(SMALLEST_STEP, SHORTER * step)
            par = balanced(self.rows, stage.const, stage.piece, stage.best.parameters, seen, step=step)
            scale = self._next_scale(stage.best.scale, found.moves, stage.const, 0.5 * step)
        return True

    def _descend(self, stage: _Stage, *, steps: int, rate: float) -> bool:
        """Follow the slope of the bound in its parameters, which is that of the majorant at the present maximisers."""
        start = (self.parameters, self.scale) if stage.best is None else (stage.best.parameters, stage.best.scale)
        search = Descent(start[0], start[1], steps=steps, rate=rate)
        for _ in search:
            with torch.enable_grad():
                par, scale = search.parameters(), search.scale()
                found = self._coefficients(stage, par)
            evaluated = self._evaluate(stage, found, detached(par), scale.detach())
            if evaluated is None:
                return False
            with torch.enable_grad():
                search.step(self._saddle(stage, found, scale, evaluated))
        return True

    def _saddle(self, stage: _Stage, found: Coefficients, scale: Tensor, at: _Found) -> Tensor:
        """The dual function at fixed maximisers: it has the slope of the bound in the parameters and the scale."""
        with torch.no_grad():
            images = moments(self.rows, at.moves)
        value = value_at(self.rows, found, images).mean()
        if not isinstance(self.threat, PerTokenBall):
            return value
        square = scale.square()
        spent = (square * self.coordinates.taken(at.moves).square()).sum((-2, -1)).mean()
        return value + 0.5 * at.solution.multiplier * (stage.const.budget.epsilon**2 * square.sum() - spent)

    def _coefficients(self, stage: _Stage, par: Parameters) -> Coefficients:
        return coefficients(self.rows, stage.const, stage.piece, par, spread=stage.spread)

    def _evaluate(
        self, stage: _Stage, found: Coefficients, par: Parameters, scale: Tensor, *, expansions: int | None = None
    ) -> _Found | None:
        """Solve the trust region of these parameters and keep the best; None where a number left its range."""
        with torch.no_grad():
            form = assembled(self.rows, found)
            region = ellipsoid(self.threat, stage.const.budget, scale)
            quadratic = self.coordinates.quadratic(form, region)
            solution = self._solved(quadratic, region, EXPANSIONS if expansions is None else expansions)
            if solution is None:
                return None
            moves = self.coordinates.moves(solution.points, region)
        new = _Found(solution, par, scale, moves, self.coordinates.kept(solution.points[:1], region))
        if solution.value < stage.value:
            stage.best = new
        return new

    def _solved(self, quadratic: Quadratic, region: Ellipsoid, expansions: int) -> Maximiser | None:
        if not bool(torch.isfinite(quadratic.gradient.sum())) or not math.isfinite(quadratic.constant):
            return None
        try:
            solution = self._approximate(quadratic, region, expansions)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined,unused-ignore]  # what is decomposed is not finite
            return None
        return solution if math.isfinite(solution.value) and solution.value > 0.0 else None

    def _approximate(self, quadratic: Quadratic, region: Ellipsoid, expansions: int) -> Maximiser:
        size = quadratic.gradient.numel()
        if size <= DENSE_LIMIT:
            return decomposed_bound(quadratic, region.radius)[1]
        if self.starts is None:
            generator = torch.Generator().manual_seed(stream(self.seed, "starts"))
            start = torch.randn(1, size, generator=generator, dtype=torch.float64).to(quadratic.gradient)
            solution = approximate(quadratic, region.radius, start, steps=FIRST_PRODUCTS)
        else:
            starts = self.coordinates.again(self.starts, region)
            solution = followed(
                quadratic,
                region.radius,
                starts,
                expansions=expansions,
                settled=SETTLED if expansions == EXPANSIONS else SHARP,
            )
        kept = self.coordinates.kept(solution.points[:1], region)
        self.starts = kept if self.starts is None else torch.cat([kept, self.starts])[:FOLLOWED]
        return solution

    def _remember(self, moves: Tensor) -> References:
        new = references(self.rows, moves)
        numbers = max(self.rows.advantage.numel(), new.gram[0].numel())  # of each
        keep = min(MEMORY, max(4, MEMORY_NUMBERS // numbers))
        self.memory = new if self.memory is None else self.memory.followed_by(new, keep=keep)
        return self.memory

    def _next_scale(self, scale: Tensor, moves: Tensor, const: Constants, power: float) -> Tensor:
        """Raise the weight of coordinates that leave the set and lower that of unused ones (any weights are sound)."""
        if not isinstance(self.threat, PerTokenBall):
            return scale
        square = self.coordinates.taken(moves).square().mean(0)
        if scale.shape[1] == 1:
            square = square.sum(-1, keepdim=True)
        target = const.budget.epsilon**2
        scale = scale * ((square + SMOOTH * target) / ((1.0 + SMOOTH) * target)) ** power
        return scale / scale.amax()


def _first_scale(gradient: Float[Tensor, "m d"], threat: MoveThreat) -> Float[Tensor, "m _"]:
    """Optimal for a linear drop: ``scale^2`` proportional to ``|G|``, by tokens or by coordinates."""
    size = gradient.abs()
    if not (isinstance(threat, PerTokenBall) and threat.norm == "linf"):
        size = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    size = size + FLOOR * size.mean() + SMALLEST_UNIT
    return (size / size.amax()).sqrt()
