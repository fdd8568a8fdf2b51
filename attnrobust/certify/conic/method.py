"""Margin certificate of a small layer by a conic program, from its repaired dual bound."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnrobust.certify.conic.basis import Bases
from attnrobust.certify.conic.margin_program import drop_gradient, margin_program, moves_of
from attnrobust.certify.conic.program import repaired_bound
from attnrobust.certify.conic.row import MoveSet, Row, move_set, rows_of
from attnrobust.certify.conic.size import Size, size_of
from attnrobust.certify.conic.solver import solve
from attnrobust.certify.method import PLACED_FEATURES, CertificateMethod, PreparedBound
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall

SECONDS_LIMIT = 600.0  # of one certificate
GUESS = 0.65  # of the first-order radius; where certificates of random layers end up


class ConicMargin(CertificateMethod):
    """Every class margin by a convex relaxation: semidefinite moments of each row, softmax envelopes, McCormick planes.

    ``usage(r) = max_c -(repaired bound of min -drop_c / margin_c)`` over a convex set that holds the true quantities of
    every move of size r. The bound holds for any multipliers, so the solver is not trusted.
    """

    name: ClassVar[str] = "conic-margin"
    reference: ClassVar[str] = "derived, docs/conic-certificate.md; softmax bounds after Wei et al. 2023"
    region: ClassVar[str] = "every move of the threat up to the radius, label unchanged"
    relative_tolerance: ClassVar[float] = 5e-3  # a solve costs seconds
    layers = (Attention,)
    features = PLACED_FEATURES
    goals = (Margin,)

    def refuses_more(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("cvxpy") is None:
            return "cvxpy is not installed; pip install cvxpy"
        size = _size(problem)
        return None if size.seconds <= SECONDS_LIMIT else f"{size}; the limit is {SECONDS_LIMIT:.0f} s"

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        resolved, n = problem.resolved, problem.clean.n
        assert resolved.weights is not None  # noqa: S101 - a margin pools its rows; narrows the types
        assert resolved.functionals is not None  # noqa: S101
        parts = tuple(
            _Part(threat, tuple(rows_of(problem, functional, resolved.weights, threat.movable(n))), float(budget))
            for threat in _pieces(problem)
            for functional, budget in zip(resolved.functionals, resolved.budgets, strict=True)
        )
        return _Bound(parts, n, problem.clean.width, _size(problem).bases)


def _pieces(problem: Problem) -> Sequence[FrobeniusBall | PerTokenBall]:
    """Convex pieces whose union is the threat's set."""
    threat = problem.threat
    if isinstance(threat, AnyToken):
        return threat.branches(problem.clean.n)
    assert isinstance(threat, FrobeniusBall | PerTokenBall)  # noqa: S101 - others are refused; narrows the type
    return (threat,)


def _size(problem: Problem) -> Size:
    layer, resolved = problem.network, problem.resolved
    assert isinstance(layer, Attention)  # noqa: S101 - others are refused; narrows the type
    assert resolved.weights is not None  # noqa: S101 - a margin pools its rows
    bias = layer.score_bias(problem.clean.n)
    counted = resolved.weights.cpu() > 0
    seen = [problem.clean.n] * int(counted.sum())
    if bias is not None:
        shown = bias if bias.ndim == 2 else bias[0]  # biases of heads are finite: all heads see the same keys
        seen = shown.isfinite().sum(dim=1).cpu()[counted].tolist()
    pieces = _pieces(problem)
    return size_of(
        heads=layer.heads, keys=seen, moving=int(pieces[0].movable(problem.clean.n).sum()), width=layer.width,
        programs=len(pieces) * len(resolved.budgets),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Part:
    """One class and one convex piece of the threat."""

    threat: FrobeniusBall | PerTokenBall
    rows: tuple[Row, ...]
    budget: float

    def slope(self, reach: MoveSet) -> float:
        """First-order drop over the budget."""
        m, d = self.rows[0].moving, len(self.rows[0].beta)
        moves = moves_of(np.arange(m * d).reshape(m, d), reach)
        return moves.support(drop_gradient(self.rows)) * reach.token / self.budget

    def usage(self, reach: MoveSet, *, bases: Bases) -> float:
        """Upper bound of ``drop / budget`` over the set; infinite where the solver gave up."""
        program = margin_program(self.rows, reach, budget=self.budget, bases=bases).program
        if not program.moments:  # no weight can change: the drop is linear and its bound needs no multipliers
            return -repaired_bound(program, [np.zeros_like(rows.const) for rows in program.rows])
        found = solve(program)
        return np.inf if found is None else -repaired_bound(program, found.values)


@dataclass(frozen=True, eq=False)
class _Bound(PreparedBound):
    parts: tuple[_Part, ...]
    n: int
    width: int
    bases: Bases

    def usage(self, radius: float) -> Upper:
        worst = 0.0
        for part in self.parts:
            reach = move_set(part.threat, self.n, self.width, radius)
            used = Upper(part.usage(reach, bases=self.bases))  # refuses NaN, which max() would swallow
            worst = max(worst, used.value)
        return Upper(worst)

    @property
    def first_guess(self) -> float | None:
        slope = max(part.slope(move_set(part.threat, self.n, self.width, 1.0)) for part in self.parts)
        return GUESS / slope if slope > 0.0 else None
