"""Displacement certificate: exact first order, proved second-order remainder, one joint eigenvalue bound."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.bounds import Upper
from attnrobust.certify._certify import CertificateMethod, PreparedBound
from attnrobust.certify.displacement_base import CleanRows
from attnrobust.certify.displacement_bilinear import ESTIMATE_STREAM, QueryKeyForm, ValueLogitForm
from attnrobust.certify.displacement_majorant import LogitForms, Majorant, padded
from attnrobust.certify.displacement_operator import JointProduct
from attnrobust.layers.attention import Attention
from attnrobust.layers.attention_jacobian import AttentionJacobian
from attnrobust.linear_map import LinearMap, largest_eigenvalue_upper
from attnrobust.problem import Problem
from attnrobust.threat import PerTokenBall

FAILURE = 1e-10  # of one eigenvalue bound; a radius needs about 30 of them
DENSE_LIMIT = 300  # n d up to which every eigenvalue is computed without randomness
POWER_STEPS = 8  # of the first guess
GUESS_SEED = 2**41  # apart from the seeds of the bounds: what is bounded must not depend on a bound's start vector
ROUNDS = 2  # rebalancing rounds of the joint bound
TOKEN_ROUNDS = 4  # the same where token scales adapt too
SETTLED = 0.1  # largest change of a log share after which another round gains less than a thousandth


@dataclass(eq=False)
class DisplacementBound(PreparedBound):
    """``||pooled(X0 + D) - pooled(X0)|| <= ||J D|| + mixing (sum_k |L_k D| + constant)`` on the ball (eq. 4).

    Args:
        problem: The question.
        seed: Seed of random start vectors.
    """

    problem: Problem
    seed: int

    def __post_init__(self) -> None:
        layer, clean = self.problem.network, self.problem.clean
        assert isinstance(layer, Attention)  # noqa: S101 - `refuses` was asked first; narrows the type
        movable = self.problem.threat.movable(clean.n)
        weights = self.problem.resolved.weights
        self._rows = CleanRows(layer, clean.points, self.problem.mass, weights, movable)
        jacobian = AttentionJacobian(layer, clean.points, self.problem.mass)
        self._jacobian: LinearMap = jacobian.linear_map(pool=weights, token_scale=self._rows.moves)
        self._majorant = Majorant(self._rows)
        self._calls = 0
        self._random = 0.0
        self._value_form = ValueLogitForm(self._rows, self._next_seed(self._rows.layer.heads), FAILURE, DENSE_LIMIT)
        self._random += self._value_form.reach[1]
        self._product = JointProduct(self._rows, self._majorant, self._value_form, QueryKeyForm(self._rows))
        factor = self.problem.threat.frobenius_factor(clean.n, clean.width)
        self._scale = factor
        # Token scales t with sum over movable tokens of 1/t_j^2 = their number; they only adapt for per-token balls.
        self._tokens = torch.ones_like(clean.points[:, :1])
        self._first, self._shares = self._first_order()

    def _next_seed(self, count: int = 1) -> int:
        self._calls += count
        return self.seed * 1_000_003 + self._calls - count

    def _first_order(self) -> tuple[float, Float[Tensor, "k"]]:
        """A rough norm of J for the first guess (any value is sound) and the first shares."""
        generator = torch.Generator().manual_seed(self.seed ^ ESTIMATE_STREAM)
        vector = torch.randn(self._rows.points.shape, generator=generator, dtype=torch.float64).to(self._rows.points)
        norm = 0.0
        for _ in range(POWER_STEPS):
            vector = self._jacobian.rmatvec(self._jacobian.matvec(vector / max(norm, 1e-300) if norm else vector))
            norm = float(torch.linalg.vector_norm(vector))
        return max(math.sqrt(norm), 1e-150), torch.tensor([1.0, 0.05, 0.05, 0.05], dtype=torch.float64)

    @property
    def failure_probability(self) -> float:
        return self._random

    @property
    def first_guess(self) -> float | None:
        return 0.7 * self.budget / (self._first * self._scale)

    @cached_property
    def budget(self) -> float:
        """Allowed displacement."""
        return float(self.problem.resolved.budgets[0])

    def usage(self, radius: float) -> Upper:
        """Upper bound of the used share on the threat's set of this radius; infinite where constants overflow."""
        reach = radius * self._scale
        forms = self._majorant.forms(reach)
        if not forms.finite:
            return Upper(math.inf)
        mixing = self._rows.mixing
        scales = torch.tensor([1.0, mixing * reach, mixing * reach, mixing * reach], dtype=torch.float64)
        value = self._joint(forms, scales) * reach + mixing * forms.constant
        return Upper(padded(value / self.budget), self._random)

    def _joint(self, forms: LogitForms, scales: Float[Tensor, "4"]) -> float:
        """Upper bound of ``sup over |D| = 1 of sum_k scales_k X_k(D)^{1/2}``: Cauchy-Schwarz with shares (eq. 19)."""
        shape = self._rows.points.shape
        best = math.inf
        per_token = isinstance(self.problem.threat, PerTokenBall)
        for _ in range(TOKEN_ROUNDS if per_token else ROUNDS):
            shares, tokens = self._shares, self._tokens
            factors = scales.square() / shares

            def product(flat: Tensor, factors: Tensor = factors, tokens: Tensor = tokens) -> Tensor:
                return (tokens * self._product.apply(tokens * flat.reshape(shape), forms, factors)[0]).reshape(-1)

            bounds = largest_eigenvalue_upper(
                product, math.prod(shape), failure_probability=FAILURE, seed=self._next_seed(), tol=2e-3,
                dense_limit=DENSE_LIMIT, device=self._rows.points.device,
            )  # fmt: skip
            self._random += bounds.upper.failure_probability
            best = min(best, math.sqrt(max(bounds.upper.value, 0.0) * float(shares.sum())))
            vector = bounds.vector.reshape(shape)
            squares = self._product.apply(tokens * vector, forms, factors)[1]
            sizes = scales * squares.clamp_min(0.0).sqrt()
            self._shares = (sizes / sizes.sum().clamp_min(1e-300)).clamp_min(1e-3)
            if per_token:
                self._tokens = self._rescaled(tokens, vector)
            elif float((self._shares / shares).log().abs().max()) < SETTLED:
                break
        return best

    def _rescaled(self, tokens: Float[Tensor, "n 1"], vector: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """Token scales that move the maximiser towards equal token moves, normalised (eq. 20)."""
        moves = self._rows.moves[:, None]
        count = float(moves.sum())
        share = moves * (vector.square().sum(dim=1, keepdim=True) * count + 0.05)
        wanted = moves * (tokens.reciprocal().square() * share).sqrt()
        inverse = moves * (wanted * count / float(wanted.sum())).clamp_min(1e-6)
        inverse = inverse * count / float(inverse.sum())  # after the clamp: the sum is what eq. 20 relies on
        return torch.where(moves > 0, inverse.rsqrt(), torch.ones_like(tokens))


class DisplacementCertificate(CertificateMethod):
    """Displacement of one attention layer: ``r ||J||`` exactly, plus a remainder that vanishes like r^2.

    Holds for multi-head dot-product attention with masks, masses, biases and output projection.

    References:
        Derived; proof in docs/displacement-certificate.md.
    """

    name: ClassVar[str] = "displacement"
    reference: ClassVar[str] = "derived; docs/displacement-certificate.md, theorem 1"
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"

    def refuses(self, problem: Problem) -> str | None:
        if not isinstance(problem.network, Attention):
            return "the network is not a single attention layer"
        if problem.resolved.functionals is not None:
            return "the goal is a margin; this method bounds displacements"
        return None

    def prepare(self, problem: Problem, *, seed: int) -> DisplacementBound:
        return DisplacementBound(problem, seed)
