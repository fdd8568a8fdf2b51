"""What attention does beyond its first order, from the parts of the displacement certificate."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows, ValueRows
from attnrobust.certify.displacement.bilinear import QueryKeyForm, ValueLogitForm, value_logit_form
from attnrobust.certify.displacement.joint_form import JointProduct
from attnrobust.certify.displacement.remainder import LogitForms, RemainderMajorant
from attnrobust.certify.displacement.shares import balanced_shares
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.lanczos import largest_eigenvalue_upper
from attnrobust.numerics.rounding import FORMULA, nan_is_infinite, outward

DENSE_LIMIT = 64  # n d up to which every eigenvalue is computed without randomness
ROUNDS = 2  # rebalancing rounds of the joint bound
MAX_STEPS = 60  # of an eigenvalue bound; fewer only widen it
GRID = 1.03  # between two sizes at which coefficients are computed: the search reuses them
SMALLEST_BALL, LARGEST_BALL = 1e-30, 1e30
REMEMBERED = 4  # directions that choose the shares


def enclosing(size: float) -> float | None:
    """The next larger of a few sizes, at which coefficients are computed; None where there is none.

    On the ball of that size the parts are at most linear in the move's length, so a bound there holds, in proportion,
    on every smaller ball.
    """
    if not SMALLEST_BALL < size < LARGEST_BALL:
        return SMALLEST_BALL if size <= SMALLEST_BALL else None
    found = GRID ** math.ceil(math.log(size) / math.log(GRID))
    return found if found >= size else found * GRID


@dataclass(frozen=True, eq=False)
class SubtractedRows(MovingRows):
    """Rows whose first order is subtracted: equation (3), with its drift, in every layer."""

    @property
    def separate(self) -> bool:
        """The form (3a) shrinks the first order instead, which is no remainder."""
        return False


@dataclass(eq=False)
class RowRemainders:
    """``f(X + D) - f(X) - J D`` over ``||D||_F <= size``, D on some tokens: the whole at once, and row by row.

    Args:
        clean: Clean rows.
        movable: Tokens that move.
        chance: Failure probability of the eigenvalue bounds.
    """

    clean: ValueRows
    movable: Bool[Tensor, "n"]
    chance: Chance
    _seen: list[Tensor] = field(default_factory=list, repr=False)
    _forms: dict[float, LogitForms] = field(default_factory=dict, repr=False)
    _slopes: dict[float, float] = field(default_factory=dict, repr=False)

    @cached_property
    def _rows(self) -> SubtractedRows:
        return SubtractedRows(self.clean, None, self.movable)

    @cached_property
    def _majorant(self) -> RemainderMajorant:
        return RemainderMajorant(self._rows)

    @cached_property
    def _clean_pair(self) -> ValueLogitForm:
        return value_logit_form(self._rows, seed=0)

    @cached_property
    def _key_form(self) -> QueryKeyForm:
        return QueryKeyForm(self._rows)

    def _forms_at(self, ball: float) -> LogitForms | None:
        """Coefficients on a ball; None where they overflow."""
        if ball not in self._forms:
            self._forms = {ball: self._majorant.forms(ball)}
        return self._forms[ball] if self._forms[ball].finite else None

    # ---- row by row ------------------------------------------------------------------------------------------------

    def heads(self, size: float, tokens: Float[Tensor, "n"]) -> Float[Tensor, "h n"]:
        """Bounds R_hi of the head vectors of every row (equations 11 to 18, one row at a time)."""
        clean, ball = self.clean, enclosing(size)
        forms = None if ball is None else self._forms_at(ball)
        if ball is None or forms is None:
            return torch.full_like(clean.beta_norm, torch.inf)
        bilinear = clean.bilinear_norms[:, None] * tokens
        curved = forms.multiplier * (ball * size)
        values = self._majorant.diagonal_reach(forms.paired.square()).sqrt() * clean.value_norms[:, None] * size**2
        crossed = self._rows.value_reach * bilinear * size
        return nan_is_infinite(outward(curved + values + crossed + forms.query.sqrt() * bilinear, FORMULA))

    def rows(self, size: float, tokens: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Bounds of the output's rows: heads added up, or stacked before the output projection."""
        heads = self.heads(size, tokens)
        stacked = self.clean.mixing * torch.linalg.vector_norm(heads, dim=0)
        return torch.minimum(stacked, heads.sum(dim=0))

    def readout(
        self, cotangents: Float[Tensor, "c n e"], size: float, tokens: Float[Tensor, "n"]
    ) -> Float[Tensor, "c"]:
        """Bounds of ``|<cotangents_c, remainder>|``."""
        pulled = torch.linalg.vector_norm(self._pulled(cotangents), dim=-1)
        found: Tensor = (pulled * self.heads(size, tokens)).sum(dim=(-2, -1))
        return outward(torch.nan_to_num(found, nan=torch.inf), FORMULA)

    def _pulled(self, cotangents: Float[Tensor, "c n e"]) -> Float[Tensor, "c h n r"]:
        """``U_h c_i``, with the orthonormal rows U_h of the output projection."""
        layer = self.clean.layer
        if layer.w_o is None:
            heads: Tensor = cotangents.unflatten(-1, (layer.heads, layer.value_width))
            return heads.transpose(-3, -2)
        basis = torch.linalg.qr(layer.w_o.transpose(-1, -2)).Q
        return torch.einsum("cne,her->chnr", cotangents, basis)

    # ---- the whole -------------------------------------------------------------------------------------------------

    def whole(self, size: float) -> float:
        """Bound of the Frobenius norm: the joint form (19) without its first part; inf where it says nothing."""
        ball = enclosing(size)
        if ball is None or ball > self._size_of_tokens:
            return math.inf
        if ball not in self._slopes:
            self._slopes = {ball: self._joint(ball)}
        return outward(self._slopes[ball] * size, FORMULA)

    @cached_property
    def _size_of_tokens(self) -> float:
        """Moves that are longer than all tokens together are left to what saturates."""
        return float(torch.linalg.vector_norm(self.clean.points))

    def _joint(self, size: float) -> float:
        """The bound on the ball of this size, per unit of the move's length."""
        forms = self._forms_at(size)
        if forms is None:
            return math.inf
        product = JointProduct(self._rows, self._majorant, self._clean_pair.grown(forms.paired), self._key_form)
        mixing = self.clean.mixing
        scales = self.clean.points.new_tensor([0.0, mixing * size, mixing * size, mixing * size, mixing])
        best = math.inf
        for _ in range(ROUNDS):
            try:
                found = self._bounded(product, forms, scales)
            except ValueError:  # a product left float64
                return best
            if not math.isfinite(found):
                return best
            best = min(best, found)
            if len(self._seen) > 1:  # later radii begin with shares that are already balanced
                break
        return best

    def _bounded(self, product: JointProduct, forms: LogitForms, scales: Float[Tensor, "5"]) -> float:
        """Cauchy-Schwarz with the shares that are best on the directions seen so far; any shares are sound."""
        shares = self._shares(product, forms, scales)
        factors = scales.square() / shares

        def apply(flat: Tensor) -> Tensor:
            return product.apply(self._embedded(flat), forms, factors)[0][self.movable].reshape(-1)

        share, seed = self.chance.next_event()
        points = self.clean.points
        bounds = largest_eigenvalue_upper(
            apply, int(self.movable.sum()) * points.shape[1], failure_probability=share, seed=seed, tol=2e-2,
            max_steps=MAX_STEPS, dense_limit=DENSE_LIMIT, device=points.device,
        )  # fmt: skip
        self.chance.spend(bounds.upper.failure_probability)
        self._seen = [self._embedded(bounds.vector), *self._seen[: REMEMBERED - 1]]
        return math.sqrt(max(bounds.upper.value, 0.0) * float(shares.sum()))

    def _shares(self, product: JointProduct, forms: LogitForms, scales: Float[Tensor, "5"]) -> Float[Tensor, "5"]:
        moves = self._seen or [self._start()]
        parts = [product.apply(move, forms, scales.square())[1].clamp_min(0.0) * scales.square() for move in moves]
        stacked = torch.stack(parts)
        if not bool(torch.isfinite(stacked).all()):
            return torch.full_like(scales, 0.2)
        return balanced_shares(stacked)[0]

    def _start(self) -> Float[Tensor, "n d"]:
        generator = torch.Generator().manual_seed(0)
        points = self.clean.points
        start = torch.randn(points.shape, generator=generator, dtype=torch.float64).to(points) * self.movable[:, None]
        unit: Tensor = start / torch.linalg.vector_norm(start)
        return unit

    def _embedded(self, flat: Float[Tensor, "N"]) -> Float[Tensor, "n d"]:
        moves = torch.zeros_like(self.clean.points)
        moves[self.movable] = flat.reshape(-1, moves.shape[1])
        return moves
