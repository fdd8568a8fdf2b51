"""Lower bounds of Lipschitz constants: ascent on the norm of the derivative over a set of inputs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.method import twice_differentiable
from attnrobust.attacks.search.geometry import Geometry
from attnrobust.errors import InputError, UnknownNameError, one_line
from attnrobust.layers.token_map import require_layer
from attnrobust.lipschitz.derivative import (
    INPUT_BALL,
    JacobianNorm,
    Products,
    derivative_norm,
    dual_direction,
    random_directions,
)
from attnrobust.lipschitz.starts import ATOM_SPREAD, Masses, ascent_starts
from attnrobust.numerics.sides import Lower
from attnrobust.problem import TokenMap
from attnrobust.threats.base import Threat
from attnrobust.threats.moves import MoveThreat, PerTokenBall
from attnrobust.threats.parse import parse_move_threat
from attnrobust.tokens import TokenMeasure, as_count, as_positive, as_seed, require_finite

INNER = 2
"""Power iterations of the direction at every step; it is carried along, so few are enough."""
LEARNING_RATE, MASS_RATE = 0.1, 0.5
"""First Adam steps: moves in units of epsilon, log-masses."""
REGROUPED = 4
"""Rounds, in the second half of the steps, that start from variants of the best input."""


@dataclass(frozen=True, eq=False)
class LipschitzResult:
    """A lower bound of a Lipschitz constant, with the input that shows it.

    Args:
        lower: Norm of the derivative at ``tokens``, from below.
        tokens: The input.
        norm: Norm of inputs and outputs.
        start: The kind of start that led there: "random" or "eigenvector".
        evaluations: Derivatives computed, all starts together.
        seed: Seed of the run.
    """

    lower: Lower
    tokens: TokenMeasure
    norm: JacobianNorm
    start: str
    evaluations: int
    seed: int


def lipschitz_search(
    network: TokenMap,
    center: Float[Tensor, "n d"],
    epsilon: float,
    *,
    threat: Geometry | None = None,
    masses: Masses | Float[Tensor, "n"] = "equal",
    norm: JacobianNorm = "l2",
    planted: bool = True,
    restarts: int = 8,
    steps: int = 200,
    seed: int = 0,
) -> LipschitzResult:
    r"""Maximise ``||D_X f||`` over the ball of radius epsilon around a center (Adam on tokens and log-masses).

    On a convex set the supremum is the Lipschitz constant there, so every value found is a lower bound of it. The
    center 0 with per-token l2 balls gives the set of all inputs whose tokens have norm at most epsilon. All tokens
    count in the norm of the derivative, also those that the threat does not let move.

    With masses m and D = diag(m), "l2" is the largest singular value of ``D^{1/2} J D^{-1/2}`` (of J where the masses
    are equal): without a mask, the rate at which W_2 grows when atoms move. "max-token" compares the largest token
    moves (W_infinity), "linf" the largest entries (the largest absolute row sum of the flattened J).

    Args:
        network: The layer or network.
        center: Middle of the ball, (n, d).
        epsilon: Its radius, > 0.
        threat: Shape of the ball; None means per-token l2 balls.
        masses: "equal", "free" (the masses of the n atoms are searched as well), or fixed masses (n,): an atom of mass
            c/m stands for c equal tokens of m, so few atoms show lower bounds for any number of tokens.
        norm: "l2", "max-token" or "linf".
        planted: Whether the eigenvector inputs of an attention layer are among the starts, see ``finite_lower`` and
            ``mean_field_lower``.
        restarts: Random starts; all starts advance together.
        steps: Ascent steps.
        seed: Seed of the run.

    Returns:
        The largest value met, computed again at its input.

    Raises:
        InputError: epsilon, restarts or steps that are not positive, a center that does not fit, nothing finite.
        UnknownNameError: A norm or a kind of masses that does not exist.

    References:
        Eigenvector inputs: form reported from Castin, Ablin and Peyre (ICML 2024). The ascent is derived
        (docs/attacks.md).
    """
    require_layer(network)
    center, epsilon, seed = require_finite("the center", center), as_positive("epsilon", epsilon), as_seed(seed)
    restarts, steps = as_count("restarts", restarts), as_count("steps", steps)
    fixed = TokenMeasure(center, masses).mass if isinstance(masses, Tensor) else None
    kind: Masses = "fixed" if isinstance(masses, Tensor) else masses
    _refuse(network, center, "equal" if isinstance(masses, Tensor) else masses, norm)
    geometry: Geometry = as_geometry(PerTokenBall() if threat is None else threat)
    names, moves, logits = ascent_starts(network, center, epsilon, geometry, kind, planted, restarts, seed)
    if fixed is not None:
        logits = fixed.log().expand_as(logits).clone()
    ascent = _Ascent(network, center, epsilon, geometry, kind, norm)
    with twice_differentiable():
        found = ascent.run(moves, logits, max(1, steps // 2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(REGROUPED if steps >= 2 * REGROUPED else 0):
        winner = int(found.values.argmax())
        if math.isfinite(float(found.values[winner])):
            again = ascent.run(
                *_merged(center, found, winner, generator), steps // (2 * REGROUPED), seed=seed, pace=0.2
            )
            names = [names[winner]] * len(names)
            found = again.improved(_repeated(found, winner))
    winner = int(found.values.argmax())
    if not math.isfinite(float(found.values[winner])):
        raise InputError("no start gave a finite derivative; the layer overflows on this set")
    mass = torch.softmax(found.logits[winner], dim=0) if fixed is None else fixed
    tokens = TokenMeasure(center + geometry.project(found.moves[winner], epsilon), mass / mass.sum())
    lower = derivative_norm(network, tokens, norm=norm, seed=seed, image=found.images[winner])
    return LipschitzResult(lower, tokens, norm, names[winner], steps * len(names), seed)


# ---- ascent --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Found:
    """Best value of every start, with its input and the output direction that shows it."""

    values: Float[Tensor, "r"]
    moves: Float[Tensor, "r n d"]
    logits: Float[Tensor, "r n"]
    images: Float[Tensor, "r n e"]

    def improved(self, other: "_Found") -> "_Found":
        """Start by start the better of two."""
        better = torch.isfinite(other.values) & (other.values > self.values)
        return _Found(
            torch.where(better, other.values, self.values),
            torch.where(better[:, None, None], other.moves, self.moves),
            torch.where(better[:, None], other.logits, self.logits),
            torch.where(better[:, None, None], other.images, self.images),
        )


@dataclass(frozen=True, eq=False)
class _Ascent:
    """Where and what to climb."""

    network: TokenMap
    center: Float[Tensor, "n d"]
    epsilon: float
    geometry: Geometry
    masses: Masses
    norm: JacobianNorm

    @property
    def free(self) -> bool:
        """Whether the masses move too."""
        return self.masses == "free"

    def run(
        self, moves: Float[Tensor, "r n d"], logits: Float[Tensor, "r n"], steps: int, *, seed: int, pace: float = 1.0
    ) -> _Found:
        """All starts advance together; none looks at another."""
        moves, logits = moves.clone(), logits.clone()
        # moves in units of epsilon, so that each kind of variable has its own rate
        moves.copy_(self.geometry.project(moves, self.epsilon))
        optimiser = torch.optim.Adam([{"params": [moves]}, {"params": [logits]}])
        rates = (LEARNING_RATE * self.epsilon, MASS_RATE if self.free else 0.0)
        direction = random_directions(moves, seed=seed, norm=self.norm)
        best: _Found | None = None
        for step in range(steps):
            now, direction, slopes = self._climb(moves, logits, direction)
            best = now if best is None else best.improved(now)
            share = pace * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, variable, slope, rate in zip(
                optimiser.param_groups, (moves, logits), slopes, rates, strict=True
            ):
                group["lr"], variable.grad = rate * share, -slope
            optimiser.step()
            moves.copy_(self.geometry.project(moves, self.epsilon))
        assert best is not None  # noqa: S101 - steps >= 1; narrows the type
        return best

    def _climb(self, moves: Tensor, logits: Tensor, direction: Tensor) -> tuple[_Found, Tensor, tuple[Tensor, Tensor]]:
        """Value, next direction and slopes: at a fixed output direction u the value is the dual norm of ``J^T u``."""
        with torch.enable_grad():
            points = (self.center + moves).requires_grad_(True)
            weights = logits.detach().clone().requires_grad_(self.free)
            log_mass = None if self.masses == "equal" else torch.log_softmax(weights, dim=-1)
            products = Products(self.network, points, log_mass, self.norm)
            image = dual_direction(products.push(direction), self.norm)
            for _ in range(INNER - 1):
                direction = INPUT_BALL[self.norm].steepest(products.pull(image))
                image = dual_direction(products.push(direction), self.norm)
            pulled = products.pull(image, differentiable=True)
            direction = INPUT_BALL[self.norm].steepest(pulled.detach())
            values = INPUT_BALL[self.norm].dual_norm(pulled)
            slopes = [torch.zeros_like(moves), torch.zeros_like(logits)]
            if values.requires_grad:
                variables = [points, weights] if self.free else [points]
                total = values.nan_to_num(0.0, 0.0, 0.0).sum()
                found = torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)
                slopes[: len(found)] = [slope.nan_to_num(0.0, 0.0, 0.0) for slope in found]
        values = values.detach()
        values = torch.where(torch.isfinite(values), values, -math.inf)  # never the best, and no rival of a later one
        now = _Found(values, moves.clone(), logits.clone(), image)
        return now, direction.nan_to_num(0.0, 0.0, 0.0), (slopes[0], slopes[1])


# ---- variants of the best -----------------------------------------------------------------------------------------


def _merged(
    center: Float[Tensor, "n d"], found: _Found, winner: int, generator: torch.Generator
) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n"]]:
    """The best input, and variants of it where some tokens join another one; the token that reacts most stays.

    Local maxima differ in how tokens share few places, which small steps cannot change.
    """
    count, (n, _) = found.values.shape[0], center.shape
    points = center + found.moves[winner]
    source = torch.randint(n, (count,), generator=generator)
    chance = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    drawn = torch.rand(count, n, generator=generator, dtype=torch.float64)
    joins = drawn < chance
    joins[1::2] = drawn[1::2] == drawn[1::2].amin(dim=1, keepdim=True)  # every second variant moves one token
    joins[:, int(torch.linalg.vector_norm(found.images[winner], dim=-1).argmax())] = False
    joins[0] = False
    target = points[source.to(points.device)][:, None]
    near = target + ATOM_SPREAD * (points - target)
    moved = torch.where(joins.to(points.device)[..., None], near, points)
    return moved - center, found.logits[winner].expand(count, -1).clone()


def _repeated(found: _Found, winner: int) -> _Found:
    """One start's best in the place of every start."""
    one = (x[winner].expand_as(x) for x in (found.values, found.moves, found.logits, found.images))
    return _Found(*one)


def as_geometry(threat: object) -> Geometry:
    """A threat on moved tokens, or its spelling."""
    threat = parse_move_threat(threat) if isinstance(threat, str) else threat
    if not hasattr(threat, "project") or (isinstance(threat, Threat) and not isinstance(threat, MoveThreat)):
        raise InputError(f"the threat is {one_line(threat)}; give one on moved tokens, such as FrobeniusBall()")
    return threat  # type: ignore[return-value]


def _refuse(network: TokenMap, center: Tensor, masses: object, norm: object) -> None:
    if not isinstance(norm, str) or norm not in INPUT_BALL:
        raise UnknownNameError("norm", str(norm), INPUT_BALL)
    if not isinstance(masses, str) or masses not in ("equal", "free"):
        raise UnknownNameError("kind of masses", str(masses), ("equal", "free"))
    if center.ndim != 2 or center.shape[1] != network.width or center.shape[0] == 0:
        raise InputError(f"the center must have shape (n, {network.width}); got {tuple(center.shape)}")
