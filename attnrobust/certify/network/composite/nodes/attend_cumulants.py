"""Attention's remainder per row-head by joint cumulants along the path to the moved tokens.

With ``e`` the move, ``s = l + 2 t q`` and E_t the mean under the softmax weights at ``x + t e``, the derivatives of a
row in t are sums of joint cumulants of ``v + t gamma``, s and q under E_t. The weights there are at most
``W = min(1, w e^{t |l| + t^2 |q|})``, so every cumulant is bounded by moments under W: docs/network-composite.md,
lemma 12.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import ValueRows
from attnrobust.certify.network.composite.nodes.attend_terms import NEAR, Factors, Sizes, centred_sizes
from attnrobust.certify.network.composite.nodes.base import largest_eigenvalues
from attnrobust.numerics.rounding import FORMULA, outward

CELLS = 6  # of the path; every bound grows along it, so that its end stands for a cell


@dataclass(frozen=True, eq=False)
class Stacked:
    """Features of all tokens of one move together, for moves of norm 1.

    Args:
        logits: Gram matrices of ``w_j^{1/2} l_j`` per row-head, (h, n, n, n), or None: only their suprema are known.
        keys: Norm of ``(right^T e_j)_j``, (h,).
        values: Norm of ``(gamma_j)_j``, (h,).
    """

    logits: Float[Tensor, "h n n n"] | None
    keys: Float[Tensor, "h"]
    values: Float[Tensor, "h"]


@dataclass(frozen=True, eq=False)
class Bounded:
    """One order of the remainder, (h, n).

    Args:
        rows: Bound per row-head.
        factors: The same with one factor kept.
    """

    rows: Tensor
    factors: Factors


@dataclass(frozen=True, eq=False)
class Cumulants:
    """The remainder of attention on one ball.

    Args:
        clean: Clean rows.
        radius: Norm of D at most.
        first: Suprema of the features of ``T D``.
        rest: Suprema of the features of R.
        stacked: Features of the tokens of ``T D`` together.
    """

    clean: ValueRows
    radius: float
    first: Sizes
    rest: Sizes
    stacked: Stacked

    def whole(self) -> Bounded:
        """``Rem = int (1 - t) o''``, ``o'' = 2 k(gamma, s) + 2 k(v, q) + k(v, s, s)``."""
        return self._along(2, lambda at: at.second)

    def third(self) -> Bounded:
        """``int (1 - t)^2/2 o'''``, ``o''' = 3 k(gamma, s, s) + 6 k(gamma, q) + k(v, s, s, s) + 6 k(v, s, q)``."""
        return self._along(3, lambda at: at.third)

    def fourth(self) -> Bounded:
        """``int (1 - t)^3/6 o''''`` with ``24 k(gamma, q, s) + 4 k(gamma, s, s, s) + 12 k(v, q, q) + 12 k(v, q, s, s)``
        and ``k(v, s, s, s, s)``.
        """
        return self._along(4, lambda at: at.fourth)

    @cached_property
    def _points(self) -> "list[_Point]":
        """The end of every cell, for all orders."""
        return [_Point(self, (cell + 1) / CELLS) for cell in range(CELLS)]

    def _along(self, order: int, derivative: "Callable[[_Point], _Coefficients]") -> Bounded:
        """Cells of the path with the largest derivative of each."""
        rows = logits = queries = rest = torch.zeros_like(self.first.queries)
        for cell in range(CELLS):
            low, high = cell / CELLS, (cell + 1) / CELLS
            mass = ((1.0 - low) ** order - (1.0 - high) ** order) / math.factorial(order) * (1.0 + FORMULA)
            at = self._points[cell]
            found = derivative(at)
            rows = rows + mass * found.size
            logits = logits + mass * found.logits * at.kept[0]
            queries = queries + mass * (found.queries + 2.0 * high * at.key_size * found.logits)
            rest = rest + mass * found.logits * at.kept[1]
        return Bounded(outward(rows, FORMULA), Factors(*(outward(part, FORMULA) for part in (logits, queries, rest))))


@dataclass(frozen=True, eq=False)
class _Coefficients:
    """A derivative of the row: at most ``size``, and at most ``logits S + queries |left^T e_i|``."""

    size: Tensor
    logits: Tensor
    queries: Tensor


@dataclass(frozen=True, eq=False)
class _Point:
    """Moments under the weights at one point of the path, and with every weight before it."""

    given: Cumulants
    t: float

    # ---- weights and features --------------------------------------------------------------------------------------

    @cached_property
    def _log_weight(self) -> Tensor:
        return self.given.clean.log_weight

    @cached_property
    def _visible(self) -> Tensor:
        return ~torch.isneginf(self._log_weight)

    @cached_property
    def _queries(self) -> Tensor:
        return self.given.first.queries + self.given.rest.queries

    @cached_property
    def _keys(self) -> Tensor:
        """Supremum of ``|right^T (e_j - mean)|``."""
        both = self.given.first.keys + self.given.rest.keys
        return centred_sizes(self.given.clean.weight, both)

    @cached_property
    def _logits(self) -> Tensor:
        """Supremum of |l_j|."""
        return torch.where(self._visible, self.given.first.logits + self.given.rest.logits, 0.0)

    @cached_property
    def _bilinear(self) -> Tensor:
        """Supremum of |q_j|."""
        return torch.where(self._visible, self._queries[..., None] * self._keys, 0.0)

    @cached_property
    def _growth(self) -> Tensor:
        """Logarithm of ``W_j / w_j``: at most the growth of the score, and of a weight to 1."""
        grown = self.t * self._logits + self.t**2 * self._bilinear
        return torch.where(self._visible, torch.minimum(grown, -self._log_weight), 0.0)

    @cached_property
    def _weight(self) -> Tensor:
        """W."""
        return outward((self._log_weight + self._growth).exp(), FORMULA)

    @cached_property
    def _near(self) -> Tensor:
        return self._visible & (self._growth <= math.log(NEAR))

    # ---- sums over tokens ------------------------------------------------------------------------------------------

    def _logit_norm(self, by: Tensor) -> Tensor:
        """``(sum_j W_j by_j l_j^2)^{1/2}``: of T D together where the weights did not grow far, else by suprema."""
        coefficient, gram, radius = self._weight * by, self.given.stacked.logits, self.given.radius
        moved = _root(coefficient * self.given.rest.logits.square())
        apart = _root(coefficient * self.given.first.logits.square())
        if gram is None:
            return apart + moved
        factor, known = _finite(torch.where(self._near, (self._growth.exp() * by).sqrt(), 0.0))
        together = largest_eigenvalues(factor[..., :, None] * gram * factor[..., None, :]).sqrt() * radius + known
        far = _root(torch.where(self._near, 0.0, coefficient * self.given.first.logits.square()))
        return torch.minimum(apart, together + far) + moved

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor]:
        """K and k with ``(sum_j W_j l_j^2)^{1/2} <= K (E l^2)^{1/2} + k``."""
        largest = torch.where(self._near, self._growth, 0.0).amax(-1)
        far = _root(torch.where(self._near, 0.0, self._weight * self._logits.square()))
        return (0.5 * largest).exp(), far

    def _key_norm(self, by: Tensor) -> Tensor:
        """``(sum_j W_j by_j |right^T (e_j - mean)|^2)^{1/2}``: all tokens together, or by suprema."""
        coefficient, given = self._weight * by, self.given
        centred = torch.eye(given.clean.n, dtype=by.dtype, device=by.device) - given.clean.weight[..., None, :]
        root, known = _finite(coefficient.sqrt())
        spread = torch.linalg.matrix_norm(root[..., None] * centred, 2) * (1.0 + FORMULA) + known
        together = spread * given.stacked.keys[:, None] * given.radius
        moved = centred_sizes(given.clean.weight, given.rest.keys)
        apart = _root(coefficient * self._keys.square())
        return torch.minimum(apart, together + _root(coefficient * moved.square()))

    def _deviation(self, by: Tensor) -> Tensor:
        """``(sum_j W_j by_j (s_j - E_t s)^2)^{1/2}``."""
        rest = self._mean_score * _root(self._weight * by)
        return self._logit_norm(by) + 2.0 * self.t * self._queries * self._key_norm(by) + rest

    @cached_property
    def _one(self) -> Tensor:
        return torch.ones_like(self._weight)

    @cached_property
    def key_size(self) -> Tensor:
        """Y with ``(sum_j W_j q_j^2)^{1/2} <= |left^T e_i| Y``."""
        return self._key_norm(self._one)

    @cached_property
    def _crossed(self) -> Tensor:
        """Deviation of q."""
        return self._queries * self.key_size

    @cached_property
    def _score(self) -> Tensor:
        """Deviation of s."""
        return self._logit_norm(self._one) + 2.0 * self.t * self._crossed

    @cached_property
    def _mean_score(self) -> Tensor:
        """``|E_t s| <= t S^2``."""
        return self.t * self._score.square()

    @cached_property
    def _scores(self) -> Tensor:
        """``|s_j - E_t s|``."""
        found = self._logits + 2.0 * self.t * self._bilinear + self._mean_score[..., None]
        return torch.where(self._visible, found, 0.0)

    @cached_property
    def _farthest(self) -> Tensor:
        return self._scores.amax(-1)

    @cached_property
    def _gaps(self) -> Tensor:
        """``|gamma_j - E_t gamma| <= max |gamma_j - gamma_k|``: two tokens of one move."""
        given = self.given
        both = given.first.values + given.rest.values
        pair = both.topk(min(2, both.shape[-1]), dim=-1).values.sum(-1)
        rest = given.rest.values.topk(min(2, both.shape[-1]), dim=-1).values.sum(-1)
        return torch.minimum(pair, math.sqrt(2.0) * given.stacked.values * given.radius + rest)[:, None]

    @cached_property
    def _values(self) -> Tensor:
        """Deviation of gamma."""
        given, both = self.given, self.given.first.values + self.given.rest.values
        apart = _root(self._weight * both.square()[:, None])
        largest = self._weight.amax(-1).sqrt() * given.stacked.values[:, None] * given.radius
        return torch.minimum(apart, largest + _root(self._weight * given.rest.values.square()[:, None]))

    @cached_property
    def _clean_spread(self) -> Tensor:
        return _root(self._weight * self.given.clean.spread.square())

    @cached_property
    def _spread(self) -> Tensor:
        """Deviation of ``v + t gamma``."""
        return self._clean_spread + self.t * self._values

    @cached_property
    def _spreads(self) -> Tensor:
        """``|v_j + t gamma_j - mean|``, the drift of the mean of v at most ``t`` times the two deviations."""
        drift = self.t * (self._clean_spread * self._score + self._gaps)
        return torch.where(self._visible, self.given.clean.spread + drift[..., None], 0.0)

    @cached_property
    def _excess(self) -> Tensor:
        """``|(s - mean)^2 - 3 variance|``."""
        return torch.maximum(self._farthest.square(), 3.0 * self._score.square())

    # ---- derivatives -----------------------------------------------------------------------------------------------

    @property
    def second(self) -> _Coefficients:
        """Of the row in t, twice."""
        score, crossed = self._score, self._crossed
        curved = torch.minimum(self._deviation(self._spreads).square(), self._spread * self._farthest * score)
        size = 2.0 * self._values * score + 2.0 * self._spread * crossed + curved
        return _Coefficients(
            size, 2.0 * self._values + self._spread * self._farthest, 2.0 * self._spread * self.key_size
        )

    @property
    def third(self) -> _Coefficients:
        """Three times."""
        score, crossed, spread = self._score, self._crossed, self._spread
        cubed = self._deviation(self._spreads * self._scores).square()  # E |v| |s|^3
        bent = torch.minimum(cubed + 3.0 * spread * score.pow(3), spread * score * self._excess)
        mixed = torch.minimum(self._deviation(self._spreads.square()), spread * self._farthest)
        size = 3.0 * self._gaps * score.square() + 6.0 * (self._values + mixed) * crossed + bent
        together = (self._spreads * self._scores).amax(-1)
        kept = torch.minimum(together * score + 3.0 * spread * score.square(), spread * self._excess)
        return _Coefficients(size, 3.0 * self._gaps * score + kept, 6.0 * (self._values + mixed) * self.key_size)

    @property
    def fourth(self) -> _Coefficients:
        """Four times."""
        score, spread = self._score, self._spread
        squared = torch.minimum(self._deviation(self._spreads).square(), spread * self._farthest * score)
        cubed = torch.minimum(self._deviation(self._scores).square(), self._farthest * score.square())
        bent = (self._spreads * self._scores.square()).amax(-1)
        fourth = torch.minimum(self._deviation(self._spreads * self._scores.square()).square(), bent * score.square())
        carried = torch.minimum(
            self._gaps * self._farthest * score + 3.0 * self._values * score.square(), self._values * self._excess
        )
        together = (self._spreads * self._scores).amax(-1)
        mixed = torch.minimum(self._deviation((self._spreads * self._scores).square()), together * score)
        mixed = mixed + 3.0 * spread * score.square()
        keys = self._key_norm(self._spreads) + self.t * self.key_size * score * _root(self._weight * self._spreads)
        queries = 24.0 * self._gaps * score * self.key_size + 12.0 * mixed * self.key_size
        queries = queries + 12.0 * self._queries * keys.square()
        lower = 4.0 * spread * cubed + 6.0 * squared * score
        size = queries * self._queries + (4.0 * carried + lower) * score + fourth
        return _Coefficients(size, 4.0 * carried + lower + bent * score, queries)


def _finite(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of every row, 0 where one of them overflowed, and 0 or infinity for the row."""
    known = torch.isfinite(factor).all(-1)
    return torch.where(known[..., None], factor, 0.0), torch.where(known, 0.0, torch.inf).to(factor)


def _root(squares: Tensor) -> Tensor:
    """Root of a sum over the tokens of every row; what nobody sees counts as nothing."""
    return torch.nan_to_num(squares, nan=0.0, posinf=torch.inf).sum(-1).sqrt()
