"""Upper bounds of the first-order change of the goal's quantities per unit size of a threat."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.chance import SIDE_FAILURE, Chance, stream
from attnrobust.numerics.linear_map import (
    LinearMap,
    largest_singular_value_lower,
    largest_singular_value_upper,
    pool_rows,
    scale_tokens,
    select_tokens,
)
from attnrobust.numerics.rounding import FORMULA, outward
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, PerTokenBall

DENSE_LIMIT = 600  # smaller side up to which a decomposition is about as fast as the iteration, and deterministic
FEW_TOKENS = 8  # so many tokens get a norm each under the threat "any token"
REWEIGHTINGS = 2  # rounds of token scalings under per-token budgets
ACCURACY = 1e-3  # of the iteration: what the radius search resolves
CLASSES_AT_ONCE = 16  # gradients computed together; each needs h n^2 numbers


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """Slopes of the goal's changes at the clean input.

    Args:
        slopes: Upper bounds (c,) of ``sup |first-order change|`` over ``threat.distance <= 1``.
        failure_probability: With which all of them may fail.
    """

    slopes: Float[Tensor, "c"]
    failure_probability: float


def first_order(problem: Problem, linear: LinearMap, *, seed: int, accuracy: float = ACCURACY) -> FirstOrder:
    """Bound what a linear map of the tokens does to the goal under the threat.

    Margins: the dual norm of each functional's gradient, exact. Displacements: a largest singular value, restricted to
    what may move; under per-token budgets ``||J h|| <= ||J diag(t)||_2 (sum_j 1/t_j^2)^{1/2}`` for several scalings t.

    Args:
        problem: Threat and goal.
        linear: Map from token moves (n, d) to output changes (n, e), not yet pooled.
        seed: Seed of random start vectors.
        accuracy: Relative accuracy of singular values; coarser than the default also skips the scalings.
    """
    goal = problem.resolved
    if goal.functionals is None:
        return _displacement(problem, linear, _Norms(Chance(seed, "first order", SIDE_FAILURE, FEW_TOKENS), accuracy))
    if goal.weights is None:
        raise InputError("a functional of the output needs row weights")
    directions = goal.weights[:, None] * goal.functionals[:, None, :]
    slopes = [problem.moves.dual_norm(linear.rmatvec(part)) for part in directions.split(CLASSES_AT_ONCE)]
    return FirstOrder(outward(torch.cat(slopes), FORMULA), 0.0)


def _displacement(problem: Problem, linear: LinearMap, norms: "_Norms") -> FirstOrder:
    n, d = problem.clean.n, problem.clean.width
    pooled = pool_rows(linear, problem.resolved.weights)
    movable = problem.moves.movable(n).to(linear.device)
    if isinstance(problem.threat, AnyToken) and int(movable.sum()) <= FEW_TOKENS:
        tokens = movable.nonzero().flatten()
        single = [select_tokens(pooled, torch.arange(n, device=linear.device) == token) for token in tokens]
        return _largest([norms.upper(part) for part in single], pooled)
    frobenius = norms.upper(select_tokens(pooled, movable))
    bounds = [_scaled(frobenius, problem.moves.frobenius_factor(n, d))]
    several = isinstance(problem.threat, PerTokenBall) and int(movable.sum()) > 1
    if several and norms.accuracy <= ACCURACY:
        token = problem.moves.token_factor(n, d)
        bounds += [_scaled(bound, token) for bound in _reweighted(select_tokens(pooled, movable), norms)]
    smallest = min(value for value, _ in bounds)
    return FirstOrder(_slope(smallest, pooled), sum(failure for _, failure in bounds))


def _reweighted(linear: LinearMap, norms: "_Norms") -> list[tuple[float, float]]:
    """``||J diag(t)|| (sum 1/t^2)^{1/2}`` for scalings that even out the top singular vector over the tokens."""
    scale = torch.ones(linear.in_shape[0], dtype=torch.float64, device=linear.device)
    bounds = []
    for round_ in range(REWEIGHTINGS):
        _, vector = largest_singular_value_lower(
            scale_tokens(linear, scale), seed=stream(norms.chance.seed, "scaling", round_), tol=1e-2
        )
        # At the best scaling every token uses its whole budget: |v_j| t_j is the same for all. Any scaling is sound.
        used = torch.linalg.vector_norm(vector, dim=-1) * scale
        scale = scale / (used / used.square().mean().sqrt()).clamp(0.1, 10.0) ** 0.5
        value, failure = norms.upper(scale_tokens(linear, scale))
        bounds.append((value * float(torch.linalg.vector_norm(1.0 / scale)), failure))
    return bounds


@dataclass(frozen=True)
class _Norms:
    """Largest singular values from above; all of them share one failure probability."""

    chance: Chance
    accuracy: float

    def upper(self, linear: LinearMap) -> tuple[float, float]:
        share, seed = self.chance.next_event()
        bound = largest_singular_value_upper(
            linear,
            failure_probability=share,
            seed=seed,
            tol=self.accuracy,
            dense_limit=DENSE_LIMIT,
        )
        self.chance.spend(bound.failure_probability)
        return bound.value, bound.failure_probability


def _scaled(bound: tuple[float, float], factor: float) -> tuple[float, float]:
    return bound[0] * factor, bound[1]


def _largest(bounds: list[tuple[float, float]], like: LinearMap) -> FirstOrder:
    return FirstOrder(_slope(max(v for v, _ in bounds), like), sum(failure for _, failure in bounds))


def _slope(value: float, like: LinearMap) -> Float[Tensor, "1"]:
    """One number as the slopes of a single change."""
    return torch.tensor([value], dtype=torch.float64, device=like.device)
