"""The margin certificate for one moving token: exact logistic rows, one small trust region per token."""

from typing import ClassVar

import torch

from attnrobust.certify.margin.one_token.functional import TokenFunctionalBound
from attnrobust.certify.margin.quadratic_form import functional_rows
from attnrobust.certify.margin.rows import margin_rows
from attnrobust.certify.method import MODERN_FEATURES, CertificateMethod, PreparedBound
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.rounding import used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import AnyToken

EXPONENT_CAP = 600.0


class MarginTokenCertificate(CertificateMethod):
    """One token moves: every other row is an exact logistic function of two numbers, the token's own row a majorant.

    ``drop(delta) <= const + G_l.delta + delta M_l(r) delta / 2`` for |delta| <= r; "any one token" is the worst token.
    """

    name: ClassVar[str] = "margin-one-token"
    reference: ClassVar[str] = "derived; docs/margin-certificate.md, Theorem 2"
    region: ClassVar[str] = "every move of one token with threat distance at most the radius"
    kind: ClassVar[Kind] = Kind.FLOAT64
    relative_tolerance: ClassVar[float] = 3e-3
    layers = (Attention,)
    features = MODERN_FEATURES
    goals = (Margin,)

    def refuses_more(self, problem: Problem) -> str | None:
        if isinstance(problem.threat, AnyToken) or int(problem.threat.movable(problem.clean.n).sum()) == 1:
            return None
        return "several tokens may move at once"

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return TokenBound(problem)


class TokenBound(PreparedBound):
    """All classes and all tokens that may be the moving one."""

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, problem: Problem) -> None:
        threat, (n, d) = problem.moves, problem.clean.points.shape
        self.rows = margin_rows(problem, everywhere=True)
        # l2, l1 and maximum-norm balls of one token lie in an l2 ball of this size.
        self.factor = threat.token_factor(n, d)
        tokens = threat.movable(n).nonzero().flatten().to(self.rows.points.device)
        self.longest = float(self.rows.pair_norm.amax())
        goal = problem.resolved
        assert goal.functionals is not None and goal.weights is not None  # noqa: S101,PT018 - refused before
        self.budgets = goal.budgets.tolist()
        self.functionals = [
            TokenFunctionalBound(functional_rows(self.rows, goal.weights, f), tokens) for f in goal.functionals
        ]
        self.shares = [0.0] * len(self.budgets)  # of every class at the last radius

    @property
    def first_guess(self) -> float | None:
        slope = max(c.largest_gradient / b for c, b in zip(self.functionals, self.budgets, strict=True))
        return 0.6 / (slope * self.factor) if slope > 0.0 else None

    @torch.inference_mode(mode=False)  # the search of the parameters differentiates, whatever mode the caller is in
    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        length = radius * self.factor
        if length * self.longest > EXPONENT_CAP:
            return Upper(torch.inf)
        worst = 0.0
        # The class that was worst comes first: one whose bound is below that with the parameters at hand cannot matter.
        for k in sorted(range(len(self.shares)), key=self.shares.__getitem__, reverse=True):
            bound = self.functionals[k].bound(length, floor=worst * self.budgets[k])
            self.shares[k] = used_share(bound, self.budgets[k])
            worst = max(worst, self.shares[k])
        return Upper(worst)
