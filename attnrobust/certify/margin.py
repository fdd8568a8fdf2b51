"""The margin certificate: exact first order, a proved quadratic majorant of the rest, one joint trust region."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.bounds import Upper
from attnrobust.certify._certify import CertificateMethod, PreparedBound
from attnrobust.certify.margin_constants import Budget, Constants, constants, geometry
from attnrobust.certify.margin_form import ClassRows, class_rows
from attnrobust.certify.margin_majorant import Parameters, Pieces, balanced, initial_parameters, majorant, pieces
from attnrobust.certify.margin_rows import clean_rows
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
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threat import AnyToken, FrobeniusBall, PerTokenBall, Threat

FAILURE_PROBABILITY = 1e-9  # of the whole certificate: a union bound over every random start
EVALUATIONS = 100  # random starts that the union bound pays for; later ones say nothing
ROUNDS, WARM_ROUNDS = 7, 2  # balances of the parameters at the first and at later radii
MEMORY = 8  # reference moves that the balance averages over: fewer, and the parameters oscillate
EXPONENT_CAP = 650.0  # logit changes beyond say nothing useful and would overflow


class MarginCertificate(CertificateMethod):
    """Quadratic majorant of the drop of each margin, maximised by one trust region over all tokens, heads and rows.

    ``drop(D) <= G.D + D M(r) D / 2`` on the whole set, G the exact gradient; M(r) tends to minus the Hessian as r -> 0.
    """

    name: ClassVar[str] = "margin-majorant"
    reference: ClassVar[str] = "derived; docs/margin-certificate.md, Theorem 1"
    region: ClassVar[str] = "every perturbation with threat distance at most the radius"
    kind: ClassVar[Kind] = Kind.FLOAT64
    relative_tolerance: ClassVar[float] = 3e-3

    def refuses(self, problem: Problem) -> str | None:
        if not isinstance(problem.network, Attention):
            return "it speaks about one attention layer only"
        if problem.resolved.functionals is None:
            return "it bounds margins; the goal is a displacement"
        if isinstance(problem.threat, AnyToken):
            return "its set is a union over tokens"
        if not isinstance(problem.threat, FrobeniusBall | PerTokenBall):
            return f"it has no constants for the threat {problem.threat.key}"
        return None

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return MarginBound(problem, seed=seed)


class MarginBound(PreparedBound):
    """The majorant of every class at one problem, warm-started from radius to radius."""

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.rows = clean_rows(problem)
        self.geometry = geometry(self.rows, problem.threat)
        goal = problem.resolved
        assert goal.functionals is not None and goal.weights is not None  # noqa: S101,PT018 - refused before
        self.budgets = goal.budgets.tolist()
        self.classes = [_ClassBound(class_rows(self.rows, goal.weights, f), seed=seed) for f in goal.functionals]
        self.starts = 0

    @property
    def failure_probability(self) -> float:
        return FAILURE_PROBABILITY * self.starts / EVALUATIONS

    @property
    def first_guess(self) -> float | None:
        guesses = [
            0.6 * budget / float(self.problem.threat.dual_norm(c.rows.gradient))
            for budget, c in zip(self.budgets, self.classes, strict=True)
            if float(self.problem.threat.dual_norm(c.rows.gradient)) > 0.0
        ]
        return min(guesses, default=None)

    def usage(self, radius: float) -> Upper:
        threat, rows = self.problem.threat, self.rows
        n, d = rows.points.shape
        budget = Budget(
            frobenius=radius * threat.frobenius_factor(n, d), token=radius * threat.token_factor(n, d), epsilon=radius
        )
        const = constants(rows, self.geometry, budget)
        if not bool((const.limit < EXPONENT_CAP).all()):
            return Upper(torch.inf)
        worst = 0.0
        for class_budget, cls in zip(self.budgets, self.classes, strict=True):
            bound = cls.bound(const, threat, allowed=self.starts < EVALUATIONS)
            self.starts += bound.failure_probability > 0.0
            worst = max(worst, bound.value / class_budget)
            if worst == torch.inf:
                break
        return Upper(worst, self.failure_probability)


class _ClassBound:
    """One functional: parameters and reference points are kept between radii."""

    def __init__(self, rows: ClassRows, *, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.index = rows.rows.index
        self.parameters: Parameters = initial_parameters(rows)
        self.top: Tensor | None = None
        self.count = 0
        self.warm = False
        self.memory: Tensor | None = None

    def bound(self, const: Constants, threat: Threat, *, allowed: bool) -> Upper:
        """Upper bound of the drop on the set."""
        piece = pieces(self.rows, const, self.rows.first_norm)
        scale = self._scale(threat)
        r = const.budget.epsilon * float(scale.square().sum()) ** 0.5 if scale is not None else const.budget.frobenius
        par, best, chosen = self.parameters, torch.inf, None
        for _ in range(WARM_ROUNDS if self.warm else ROUNDS):
            quadratic, solution = self._solve(const, piece, par, scale, r)
            if solution.value < best:
                best, chosen = solution.value, (quadratic, solution, par)
            self.top = solution.top
            seen = self._remember(self._moves(solution.points, scale) / r)
            par = balanced(self.rows, const, piece, par, r * seen)
        quadratic, solution = self._solve(const, piece, par, scale, r)
        if solution.value < best or chosen is None:
            chosen = (quadratic, solution, par)
        self.top = chosen[1].top
        self.parameters, self.warm = chosen[2], True
        return self._finish(chosen[0], chosen[1], r, allowed=allowed)

    def _finish(self, quadratic: Quadratic, solution: Maximiser, r: float, *, allowed: bool) -> Upper:
        size = quadratic.gradient.numel()
        if size <= DECOMPOSE_LIMIT:
            return decomposed_bound(quadratic, r)[0]
        if size <= CHOLESKY_LIMIT:
            return factorised_bound(quadratic, r, solution)
        if not allowed:
            return Upper(torch.inf)
        self.count += 1
        return iterated_bound(
            quadratic, r, solution, failure_probability=FAILURE_PROBABILITY / EVALUATIONS,
            seed=self.seed + 7919 * self.count,
        )  # fmt: skip

    def _solve(
        self, const: Constants, piece: Pieces, par: Parameters, scale: Tensor | None, r: float
    ) -> tuple[Quadratic, Maximiser]:
        form = majorant(self.rows, const, piece, par)
        index, shape = self.index, self.rows.rows.points.shape

        def product(flat: Tensor) -> Tensor:
            part = flat.reshape(*flat.shape[:-1], -1, shape[1])
            part = part if scale is None else part / scale
            full = part.new_zeros(*flat.shape[:-1], *shape)
            full[..., index, :] = part
            image = form.apply(full)[..., index, :]
            return (image if scale is None else image / scale).flatten(-2)

        gradient = self.rows.gradient[index]
        quadratic = Quadratic(product, (gradient if scale is None else gradient / scale).flatten())
        if quadratic.gradient.numel() <= DECOMPOSE_LIMIT:
            return quadratic, decomposed_bound(quadratic, r)[1]
        start = (
            self.top
            if self.top is not None
            else torch.randn(
                quadratic.gradient.numel(), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
            ).to(quadratic.gradient)
        )
        return quadratic, approximate(quadratic, r, start)

    def _moves(self, points: Tensor, scale: Tensor | None) -> Float[Tensor, "b n d"]:
        shape = self.rows.rows.points.shape
        part = points.reshape(points.shape[0], -1, shape[1])
        full = part.new_zeros(points.shape[0], *shape)
        full[:, self.index] = part if scale is None else part / scale
        return full

    def _remember(self, moves: Tensor) -> Tensor:
        old = moves[:0] if self.memory is None else self.memory
        self.memory = torch.cat([old, moves])[-MEMORY:]
        return self.memory

    def _scale(self, threat: Threat) -> Tensor | None:
        return None
