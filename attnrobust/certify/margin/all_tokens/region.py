"""Ellipsoids around a perturbation set, and the majorant as a trust region in their coordinates."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.margin.quadratic_form import QuadraticMajorant
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


def trust_region(form: QuadraticMajorant, region: Ellipsoid, index: Bool[Tensor, "n"], *, every: bool) -> Quadratic:
    """The majorant in the coordinates ``scale * D`` of the movable tokens.

    Args:
        form: The majorant.
        region: The ellipsoid.
        index: Movable tokens.
        every: Whether all of them are.
    """

    def product(flat: Tensor) -> Tensor:
        image = form.apply(moves_of(flat, form, region, index, every=every))
        return scaled(image if every else image[..., index, :], region, back=True).flatten(-2)

    gradient = form.gradient if every else form.gradient[index]
    return Quadratic(product, scaled(gradient, region, back=True).flatten(), float(form.constant))


def moves_of(
    flat: Float[Tensor, "*b N"], form: QuadraticMajorant, region: Ellipsoid, index: Bool[Tensor, "n"], *, every: bool
) -> Float[Tensor, "*b n d"]:
    """Moves of all tokens from coordinates of the movable ones."""
    n, d = form.gradient.shape
    part = scaled(flat.unflatten(-1, (-1, d)), region, back=True)
    if every:
        return part
    full = part.new_zeros(*flat.shape[:-1], n, d)
    full[..., index, :] = part
    return full


def scaled(moves: Float[Tensor, "*b m d"], region: Ellipsoid, *, back: bool) -> Float[Tensor, "*b m d"]:
    """``scale * D``, or its inverse."""
    if region.scale is None:
        return moves
    return moves / region.scale if back else moves * region.scale


def every_token(index: Bool[Tensor, "n"]) -> bool:
    """Whether all tokens move."""
    return bool(torch.all(index))
