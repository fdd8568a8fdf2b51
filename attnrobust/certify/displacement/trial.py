"""Displacement certificate: forms, products and directions of one question, shared by search and proof."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows
from attnrobust.certify.displacement.bilinear import ValueLogitForm
from attnrobust.certify.displacement.remainder import LogitForms, RemainderMajorant
from attnrobust.numerics.lanczos import Matvec

REMEMBERED = 6  # directions that choose the shares
KEPT_VALUES = 2 * REMEMBERED  # of them at the coefficients of two radii


@runtime_checkable
class JointForm(Protocol):
    """What is asked of a joint form: ``JointProduct``, or one in other coordinates."""

    @property
    def value_form(self) -> ValueLogitForm:
        """Of the value-logit part."""
        ...

    def with_values(self, form: ValueLogitForm) -> "JointForm":
        """The same with another value-logit part."""
        ...

    def apply(
        self, moves: Float[Tensor, "n d"], forms: LogitForms, factors: Float[Tensor, "5"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "5"]]:
        """Half the gradient of the weighted sum of the five forms, and the five."""
        ...


@dataclass(eq=False)
class Trial:
    """What both look at.

    Args:
        rows: The rows, and which tokens move.
        majorant: Makes the coefficients of a radius.
        joint: The joint form at the clean input.
        seen: Directions that were worst so far, the last one first; they choose shares and start searches only.
        token_scales: t with sum over movable tokens of 1/t_j^2 = their number; they adapt for per-token balls only.
    """

    rows: MovingRows
    majorant: RemainderMajorant
    joint: JointForm
    seen: list[Float[Tensor, "n d"]]
    token_scales: Float[Tensor, "n 1"]
    warm: bool = False
    _last: tuple[float, LogitForms] | None = field(default=None, repr=False)
    _joint: tuple[LogitForms, JointForm] | None = field(default=None, repr=False)
    _values: list[tuple[LogitForms, Tensor, Float[Tensor, "5"]]] = field(default_factory=list, repr=False)

    def forms(self, reach: float) -> LogitForms:
        """Coefficients of this Frobenius norm; those of the last one are kept."""
        if self._last is None or self._last[0] != reach:
            self._last = (reach, self.majorant.forms(reach))
        return self._last[1]

    def scales(self, reach: float) -> Float[Tensor, "5"]:
        """Factors of the roots of the five forms."""
        mixing = self.rows.clean.mixing
        return self.rows.clean.points.new_tensor([1.0, mixing * reach, mixing * reach, mixing * reach, mixing])

    def _at(self, forms: LogitForms) -> JointForm:
        if self._joint is None or self._joint[0] is not forms:
            clean: ValueLogitForm = self.joint.value_form
            self._joint = (forms, self.joint.with_values(clean.grown(forms.paired)))
        return self._joint[1]

    def values(self, forms: LogitForms) -> Float[Tensor, "s 5"]:
        """The five forms at the directions seen."""
        return torch.stack([self._value(forms, vector) for vector in self.seen])

    def _value(self, forms: LogitForms, vector: Float[Tensor, "n d"]) -> Float[Tensor, "5"]:
        for known, direction, values in self._values:
            if known is forms and direction is vector:
                return values
        ones = self.rows.clean.points.new_ones(5)
        found = self._at(forms).apply(self.token_scales * vector, forms, ones)[1].clamp_min(0.0)
        others = [one[0] for one in self._values if one[0] is not forms]
        kept = [one for one in self._values if one[0] is forms or one[0] is others[0]]  # coefficients take memory
        self._values = [(forms, vector, found), *kept[: KEPT_VALUES - 1]]
        return found

    def product(self, forms: LogitForms, factors: Float[Tensor, "5"]) -> Matvec:
        """The joint form with these factors, over the movable tokens."""
        tokens, joint = self.token_scales, self._at(forms)

        def product(flat: Tensor) -> Tensor:
            image = joint.apply(tokens * self.embedded(flat), forms, factors)[0]
            return (tokens * image)[self.rows.movable].reshape(-1)

        return product

    @property
    def start(self) -> Float[Tensor, "N"]:
        """The last direction, over the movable tokens."""
        return self.seen[0][self.rows.movable].reshape(-1)

    def embedded(self, flat: Float[Tensor, "N"]) -> Float[Tensor, "n d"]:
        """A vector over the movable tokens as a move of all."""
        moves = torch.zeros_like(self.rows.clean.points)
        moves[self.rows.movable] = flat.reshape(-1, moves.shape[1])
        return moves

    def remember(self, flat: Float[Tensor, "N"], *, adapt: bool) -> None:
        """A maximiser joins the directions; the token scales follow it where they adapt."""
        vector = self.embedded(flat)
        self.seen, self.warm = [vector, *self.seen[: REMEMBERED - 1]], True
        if adapt:
            self.rescale(self._rescaled(vector))

    def rescale(self, token_scales: Float[Tensor, "n 1"]) -> None:
        """Take other token scales; what was measured with the present ones is forgotten."""
        self.token_scales, self._values = token_scales, []

    def _rescaled(self, vector: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """Token scales that move the maximiser towards equal token moves, normalised (eq. 20)."""
        tokens, moves = self.token_scales, self.rows.moves[:, None]
        count = float(moves.sum())
        share = moves * (vector.square().sum(dim=1, keepdim=True) * count + 0.05)
        wanted = moves * (tokens.reciprocal().square() * share).sqrt()
        inverse = moves * (wanted * count / float(wanted.sum())).clamp_min(1e-6)
        inverse = inverse * count / float(inverse.sum())  # after the clamp: the sum is what eq. 20 relies on
        return torch.where(moves > 0, inverse.rsqrt(), torch.ones_like(tokens))
