"""Ellipsoids around a perturbation set, and the majorant as a trust region in their coordinates."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.quadratic_form import QuadraticMajorant
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.margin.trust_region import Quadratic
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.numerics.rounding import ENTRY, outward
from attnrobust.threats.moves import MoveThreat, PerTokenBall


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """``{||scale * D||_F <= radius}``, a superset of the perturbation set; D on the movable tokens, (m, d).

    Args:
        scale: Positive, (m, 1) or (m, d); None: 1.
        radius: Its size.
    """

    scale: Float[Tensor, "m _"] | None
    radius: float


def ellipsoid(threat: MoveThreat, budget: MoveBudget, scale: Float[Tensor, "m _"]) -> Ellipsoid:
    """An ellipsoid around the set (lemma 9 of docs/margin-certificate.md).

    Frobenius ball: itself. Per token: ``sum_j s_j^2 |delta_j|^2 <= eps^2 sum_j s_j^2``, and the same coordinate by
    coordinate for the maximum norm; any positive scale is sound.
    """
    if not isinstance(threat, PerTokenBall):
        return Ellipsoid(None, budget.frobenius)
    return Ellipsoid(scale, outward(budget.epsilon * float(scale.square().sum()) ** 0.5, ENTRY))


class Coordinates:
    """The numbers that the trust region of a functional is about: ``scale * D`` of the movable tokens.

    Args:
        rows: What the functional reads; moves have the shape of its points.
    """

    def __init__(self, rows: MarginRows) -> None:
        self.index, self.shape = rows.index, rows.points.shape
        self.every = bool(torch.all(self.index))  # then nothing has to be taken out or put back

    def quadratic(self, form: QuadraticMajorant, region: Ellipsoid) -> Quadratic:
        """The majorant in these coordinates."""

        def product(flat: Tensor) -> Tensor:
            return scaled(self.taken(form.apply(self.moves(flat, region))), region, back=True).flatten(-2)

        gradient = scaled(self.taken(form.gradient), region, back=True).flatten()
        return Quadratic(product, gradient, float(form.constant))

    def moves(self, flat: Float[Tensor, "*b N"], region: Ellipsoid) -> Float[Tensor, "*b m p"]:
        """Moves of all tokens."""
        return self.placed(self.kept(flat, region))

    def taken(self, moves: Float[Tensor, "*b m p"]) -> Float[Tensor, "*b t p"]:
        """Of the movable tokens alone."""
        return moves if self.every else moves[..., self.index, :]

    def placed(self, part: Float[Tensor, "*b t p"]) -> Float[Tensor, "*b m p"]:
        """Of all tokens; adjoint of ``taken``."""
        if self.every:
            return part
        full = part.new_zeros(*part.shape[:-2], *self.shape)
        full[..., self.index, :] = part
        return full

    def kept(self, flat: Float[Tensor, "*b N"], region: Ellipsoid) -> Tensor:
        """What of a solution stays the same when the ellipsoid changes: moves of the movable tokens."""
        return scaled(flat.unflatten(-1, (-1, self.shape[1])), region, back=True)

    def again(self, kept: Tensor, region: Ellipsoid) -> Float[Tensor, "b N"]:
        """Its coordinates in an ellipsoid; inverse of ``kept``."""
        return scaled(kept, region, back=False).flatten(1)


def scaled(moves: Float[Tensor, "*b m d"], region: Ellipsoid, *, back: bool) -> Float[Tensor, "*b m d"]:
    """``scale * D``, or its inverse."""
    if region.scale is None:
        return moves
    return moves / region.scale if back else moves * region.scale
