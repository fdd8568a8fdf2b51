"""Coefficients of the quadratic majorant: every free parameter is sound, a balance at moves makes them sharp."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.quadratic_form import FunctionalRows, QuadraticMajorant, across, spread_back
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.shared.constants import shifted_slopes
from attnrobust.numerics.eigenvalues import spread_eigenvalue, spread_slope
from attnrobust.numerics.rounding import SMALLEST_UNIT

SIGNED = ("reference", "value")  # parameters of either sign; the others are positive
LIMITS = (1e-3, 1e3)  # parameters are kept in this range around their unit


@dataclass(frozen=True, eq=False)
class Parameters:
    """Free positive parameters of the inequalities (docs/margin-certificate.md, section 2).

    Args:
        split: tau in units of ``|D| r``: width of the cut of the first-order change of a row.
        reference: e in the same units: first-order change around which the cut is taken.
        value: theta_j in units of ``|gamma| r``: value change around which t_j is bounded.
        pair: e_j in units of ``|gamma|``: balance of ``|u||t|``.
        bilinear: eps_j: balance of x against q in ``u = x + q``.
        query_value: s1 in units of ``|gamma|``: balance of E[qt].
        query_mean: s2: balance of p E[qv].
        gauge: Rotary positions: mu / (1 - mu), where ``|sum_l p_l^2|`` is bounded by the share mu of N and the rest of
            ``a^2 |delta_i|^2``.
    """

    split: Float[Tensor, "h q"]
    reference: Float[Tensor, "h q"]
    value: Float[Tensor, "h n"]
    pair: Float[Tensor, "h q n"]
    bilinear: Float[Tensor, "h q n"]
    query_value: Float[Tensor, "h q"]
    query_mean: Float[Tensor, "h q"]
    gauge: Float[Tensor, "h q"]


def initial_parameters(functional: FunctionalRows) -> Parameters:
    """Parameters that are reasonable everywhere."""
    pair = torch.ones_like(functional.rows.weight)
    row, token = pair[..., 0], pair[:, 0]
    return Parameters(0.4 * row, 0.0 * row, 0.0 * token, pair, 0.3 * pair, 2.0 * row, 2.0 * row, row)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Intermediate coefficients that the majorant and the balance share."""

    shift: Tensor  # part of -E[ut] that joins the remainder
    slope: Tensor  # kp after the shift
    unit: Tensor  # |D| r


def pieces(functional: FunctionalRows, const: Constants, first_norm: Float[Tensor, "h q"]) -> Pieces:
    """Parameter-free coefficients."""
    weight = functional.rows.weight
    shift, slope = shifted_slopes(weight, const.slope, const.slope_same)
    unit = (first_norm * const.budget.frobenius).clamp_min(SMALLEST_UNIT)
    return Pieces(shift=shift, slope=slope, unit=unit)


def value_reference(functional: FunctionalRows, const: Constants, par: Parameters) -> Float[Tensor, "h n"]:
    """theta_j."""
    return par.value * functional.value_norm * const.budget.frobenius


def mass_curve(functional: FunctionalRows, const: Constants, par: Parameters, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficient of u_j^2 / 2 that bounds ``p_j (v_j - theta_j + tau - e)``, and its slope in tau."""
    cut = (par.split - par.reference) * unit
    shifted = functional.advantage - value_reference(functional, const, par)[:, None] + cut[..., None]
    effect = torch.where(shifted > 0, const.saturating, const.curvature)
    return shifted * effect, effect


def exact_spread(rows: MarginRows, coefficient: Float[Tensor, "h q n"]) -> Float[Tensor, "h q"]:
    """``spread_eigenvalue`` with its derivative."""
    value = spread_eigenvalue(coefficient.detach(), rows.weight, rows.reach)
    if not coefficient.requires_grad:
        return value
    slope = spread_slope(coefficient.detach(), rows.weight, rows.reach, value)
    return value + (slope * (coefficient - coefficient.detach())).sum(-1)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The majorant's coefficients row by row, before they are put together to products with moves.

    Args:
        moved: The functional with its advantage measured from the references theta.
        square: As in ``QuadraticMajorant``.
        mixed: Likewise.
        value: Likewise.
        centre: Likewise.
        first: Likewise.
        bilinear: Likewise.
        outer: ``pi pbar / s2 w v``: half of the form ``sum_jl outer_j (w v)_l delta_j.delta_l`` of p E[qv].
        steady: Rotary positions: coefficient of ``|delta_i|^2``, of the rows of a move; else None.
        offset: e.
        mean: ``E theta``.
        theta: theta_j.
        shifted: ``pi shift theta``, linear in x.
        linear: Linear in t.
    """

    moved: FunctionalRows
    square: Float[Tensor, "h q n"]
    mixed: Float[Tensor, "h q n"]
    value: Float[Tensor, "h n"]
    centre: Float[Tensor, "h q"]
    first: Float[Tensor, "h q"]
    bilinear: Float[Tensor, "h q"]
    outer: Float[Tensor, "h q n"]
    steady: Float[Tensor, "m"] | None
    offset: Float[Tensor, "h q"]
    mean: Float[Tensor, "h q"]
    theta: Float[Tensor, "h n"]
    shifted: Float[Tensor, "h q n"]
    linear: Float[Tensor, "h n"]

    @property
    def constant(self) -> Float[Tensor, ""]:
        """What the references cost."""
        squares = (self.first * self.offset**2).sum() + (self.value * self.theta**2).sum()
        return 0.5 * (squares - (self.centre * self.mean**2).sum())


Spread = Callable[[MarginRows, Float[Tensor, "h q n"]], Float[Tensor, "h q"]]


def coefficients(
    functional: FunctionalRows, const: Constants, piece: Pieces, par: Parameters, *, spread: Spread = exact_spread
) -> Coefficients:
    """Coefficients of Theorem 1 of docs/margin-certificate.md, differentiable in the parameters.

    Args:
        functional: The functional's rows.
        const: Constants of the set.
        piece: Parameter-free coefficients.
        par: Free parameters.
        spread: Upper bound of ``lambda_max(sum_j a_j (e_j - w) (e_j - w)^T)``; a search may estimate it, a proof not.
    """
    rows, pi = functional.rows, functional.pooling
    weight = rows.weight
    tau = par.split * piece.unit
    pair = par.pair * functional.value_norm[..., None]
    curve = mass_curve(functional, const, par, piece.unit)[0] + pair * piece.slope
    positive = curve > 0
    eps = torch.where(positive, par.bilinear, par.bilinear.clamp_max(1.0))
    square = torch.where(positive, curve * (1.0 + eps), curve * (1.0 - eps))
    rest = torch.where(positive, curve * (1.0 + 1.0 / eps), -curve * (1.0 / eps - 1.0))
    energy = const.budget.frobenius**2 * spread(rows, rest)
    kept = weight - piece.shift
    s1 = par.query_value * functional.value_norm
    value = piece.slope / pair + (const.spread / s1)[..., None] * kept
    whole = (piece.shift == 0).all(-1)
    theta = value_reference(functional, const, par)
    moved = functional.revalued(theta)
    first = pi * const.share / (2.0 * tau)
    value = (pi[:, None] * value).sum(-2)
    centre = torch.where(whole, pi * const.spread / s1, 0.0)
    mean = (weight @ theta[..., None])[..., 0]
    query = _query_coefficients(rows, pi, energy + const.spread * s1, const.share * par.query_mean, par)
    return Coefficients(
        moved=moved,
        square=pi[:, None] * square,
        mixed=pi[:, None] * kept,
        value=value,
        centre=centre,
        first=first,
        bilinear=query[0],
        outer=(pi * const.share / par.query_mean)[..., None] * moved.weighted_advantage,
        steady=query[1],
        offset=par.reference * piece.unit,
        mean=mean,
        theta=theta,
        shifted=pi[:, None] * piece.shift * theta[:, None],
        linear=value * theta - (weight.mT @ (centre * mean)[..., None])[..., 0],
    )


def assembled(functional: FunctionalRows, found: Coefficients) -> QuadraticMajorant:
    """The majorant as a linear part and an operator on moves."""
    moved = found.moved
    joint = across(functional.rows, found.outer, moved.weighted_advantage)
    return QuadraticMajorant(
        functional=moved,
        square=found.square,
        mixed=found.mixed,
        value=found.value,
        centre=found.centre,
        first=found.first,
        gradient=functional.gradient
        - spread_back(
            moved,
            found.shifted + (found.first * found.offset)[..., None] * moved.weighted_advantage,
            found.linear - (moved.rows.weight.mT @ (found.first * found.offset)[..., None])[..., 0],
        ),
        constant=found.constant,
        bilinear=found.bilinear,
        tokens=joint if found.steady is None else found.steady,
        keys=None if found.steady is None else joint,
    )


def majorant(functional: FunctionalRows, const: Constants, piece: Pieces, par: Parameters) -> QuadraticMajorant:
    """The quadratic majorant of Theorem 1 of docs/margin-certificate.md, differentiable in the parameters."""
    return assembled(functional, coefficients(functional, const, piece, par))


def _query_coefficients(
    rows: MarginRows, pi: Tensor, spread: Tensor, mean: Tensor, par: Parameters
) -> tuple[Tensor, Tensor | None]:
    """Coefficients of ``|A^T delta_i|^2`` or N(delta_i), and, with rotary positions, of ``|delta_i|^2``.

    ``spread`` multiplies a bound of ``sum_l p_l^2 / r^2``, ``p_l = delta_i A_il delta_l``, ``mean`` N itself.
    """
    if rows.layer.rotary is None:
        return pi * (spread + mean) * rows.own_movable, None
    share = par.gauge / (1.0 + par.gauge)
    steady = (pi * spread * (1.0 - share) * rows.form_norm[:, None].square()).sum(0) * rows.own_movable
    return pi * (share * spread + mean) * rows.own_movable, rows.on_asked(steady)
