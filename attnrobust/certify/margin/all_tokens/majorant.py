"""Coefficients of the quadratic majorant: every free parameter is sound, a balance at moves makes them sharp."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.quadratic_form import (
    FunctionalRows,
    LinearImages,
    QuadraticMajorant,
    across,
    linear_images,
    query_form,
    spread_back,
)
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.shared.constants import shifted_slopes
from attnrobust.numerics.eigenvalues import spread_eigenvalue, spread_slope
from attnrobust.numerics.rounding import SMALLEST_UNIT

LARGEST_MASS = 0.5  # of a row's remainder at the reference moves, as a share of its bound
ROUGH = 3  # bisections of an eigenvalue that only chooses a parameter
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


def _value_reference(functional: FunctionalRows, const: Constants, par: Parameters) -> Float[Tensor, "h n"]:
    """theta_j."""
    return par.value * functional.value_norm * const.budget.frobenius


def _mass_curve(functional: FunctionalRows, const: Constants, par: Parameters, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficient of u_j^2 / 2 that bounds ``p_j (v_j - theta_j + tau - e)``, and its slope in tau."""
    cut = (par.split - par.reference) * unit
    shifted = functional.advantage - _value_reference(functional, const, par)[:, None] + cut[..., None]
    effect = torch.where(shifted > 0, const.saturating, const.curvature)
    return shifted * effect, effect


def _spread(coefficient: Tensor, weight: Tensor, movable: Tensor) -> Tensor:
    """``spread_eigenvalue`` with its derivative."""
    value = spread_eigenvalue(coefficient.detach(), weight, movable)
    if not coefficient.requires_grad:
        return value
    slope = spread_slope(coefficient.detach(), weight, movable, value)
    return value + (slope * (coefficient - coefficient.detach())).sum(-1)


def majorant(functional: FunctionalRows, const: Constants, piece: Pieces, par: Parameters) -> QuadraticMajorant:
    """The quadratic majorant of Theorem 1 of docs/margin-certificate.md, differentiable in the parameters."""
    rows, pi = functional.rows, functional.pooling
    weight = rows.weight
    tau = par.split * piece.unit
    pair = par.pair * functional.value_norm[..., None]
    curve = _mass_curve(functional, const, par, piece.unit)[0] + pair * piece.slope
    positive = curve > 0
    eps = torch.where(positive, par.bilinear, par.bilinear.clamp_max(1.0))
    square = torch.where(positive, curve * (1.0 + eps), curve * (1.0 - eps))
    rest = torch.where(positive, curve * (1.0 + 1.0 / eps), -curve * (1.0 / eps - 1.0))
    energy = const.budget.frobenius**2 * _spread(rest, weight, rows.reach)
    kept = weight - piece.shift
    s1 = par.query_value * functional.value_norm
    value = piece.slope / pair + (const.spread / s1)[..., None] * kept
    whole = (piece.shift == 0).all(-1)
    theta = _value_reference(functional, const, par)
    moved = functional.revalued(theta)
    advantage = pi[:, None] * moved.weighted_advantage
    outer = (const.share / par.query_mean)[..., None] * advantage
    first = pi * const.share / (2.0 * tau)
    value = torch.einsum("i,hij->hj", pi, value)
    centre = torch.where(whole, pi * const.spread / s1, 0.0)
    offset, mean = par.reference * piece.unit, (weight @ theta[..., None])[..., 0]
    shifted = pi[:, None] * piece.shift * theta[:, None]
    linear = value * theta - (weight.mT @ (centre * mean)[..., None])[..., 0]
    query = _query_coefficients(rows, pi, energy + const.spread * s1, const.share * par.query_mean, par)
    return QuadraticMajorant(
        functional=moved,
        square=pi[:, None] * square,
        mixed=pi[:, None] * kept,
        value=value,
        centre=centre,
        first=first,
        gradient=functional.gradient - moved.combined(first * offset) - spread_back(functional, shifted, linear),
        constant=0.5 * ((first * offset**2).sum() + (value * theta**2).sum() - (centre * mean**2).sum()),
        bilinear=query[0],
        tokens=across(rows, outer, moved.weighted_advantage) if query[1] is None else query[1],
        keys=None if query[1] is None else across(rows, outer, moved.weighted_advantage),
    )


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


@dataclass(frozen=True, eq=False)
class References:
    """What the balance needs of reference moves; no parameter and no radius changes it.

    Args:
        x: ``l_j.Delta``.
        t: ``gamma.delta_j``.
        query: ``|A^T delta_i|^2``, or N(delta_i).
        gram: ``delta_i.delta_j``, or of rows on their own the moves themselves (b, n, d).
    """

    x: Float[Tensor, "b h q n"]
    t: Float[Tensor, "b h n"]
    query: Float[Tensor, "b h q"]
    gram: Float[Tensor, "b n _"]
    alone: bool = False

    def scaled(self, size: float) -> "References":
        """Those of ``size * Delta``."""
        gram = (size if self.alone else size**2) * self.gram
        return References(size * self.x, size * self.t, size**2 * self.query, gram, self.alone)

    def mixed(self, weighted: Float[Tensor, "h q n"]) -> Float[Tensor, "b h q"]:
        """``|sum_j weighted_j delta_j|^2``."""
        sums = weighted @ self.gram[:, None]
        squares = sums.square() if self.alone else sums * weighted
        return squares.sum(-1).clamp_min(0.0)

    def own(self, at: Int[Tensor, "q"]) -> Float[Tensor, "b q"]:
        """``|delta_i|^2`` of the tokens of the rows."""
        return self.gram[:, at].square().sum(-1) if self.alone else self.gram.diagonal(dim1=1, dim2=2)[:, at]

    def followed_by(self, other: "References", *, keep: int) -> "References":
        """The last ``keep`` moves of both."""
        pairs = ((self.x, other.x), (self.t, other.t), (self.query, other.query), (self.gram, other.gram))
        x, t, query, gram = (torch.cat([old, new])[-keep:] for old, new in pairs)
        return References(x, t, query, gram, self.alone)


def references(functional: FunctionalRows, points: Float[Tensor, "b n d"]) -> References:
    """Evaluate reference moves."""
    found: LinearImages = linear_images(functional, points)
    query = (query_form(functional.rows, found.query) * found.query).sum(-1)
    points = functional.rows.tokens_of(points)
    alone = functional.rows.at is not None
    return References(found.x, found.t, query, points if alone else points @ points.mT, alone)


def balanced(
    functional: FunctionalRows,
    const: Constants,
    piece: Pieces,
    par: Parameters,
    found: References,
    *,
    smooth: float = 0.1,
    step: float = 0.5,
) -> Parameters:
    """Parameters that make each inequality nearly tight on average over reference moves (any choice is sound).

    Args:
        functional: The functional's rows.
        const: Constants of the set.
        piece: Parameter-free coefficients.
        par: Parameters so far.
        found: Reference moves, typically the maximisers of the last bounds.
        smooth: Share of each form's mean that is added, so that no parameter collapses.
        step: How far to go from the parameters so far (0) to the balance (1); logarithms move for positive ones.
    """
    rows = functional.rows
    weighted = functional.revalued(_value_reference(functional, const, par)).weighted_advantage

    def mean(value: Tensor, dims: tuple[int, ...]) -> Tensor:
        average = value.mean(0)
        return average + smooth * average.mean(dims, keepdim=True) + SMALLEST_UNIT

    x2, t = mean(found.x.square(), (1, 2)), found.t.mean(0)
    t2 = (found.t - t).square().mean(0) + smooth * found.t.square().mean((0, 2))[:, None] + SMALLEST_UNIT
    first = (weighted * found.x).sum(-1) - (rows.weight @ found.t[..., None])[..., 0]
    average = first.mean(0)
    variance = (first - average).square().mean(0) + smooth * first.square().mean((0, 2))[:, None] + SMALLEST_UNIT
    query = mean(found.query, (1,))
    gauge = par.gauge
    if rows.layer.rotary is not None:
        steady = mean(rows.form_norm[:, None].square() * found.own(rows.asked)[:, None], (1,))
        gauge, query = (steady / query).square(), torch.minimum(query, steady)
    mixed = mean(found.mixed(weighted), (1,))
    pair = (t2[:, None, :] / x2).sqrt() / functional.value_norm[..., None]
    e = par.pair * functional.value_norm[..., None]
    curve, effect = _mass_curve(functional, const, par, piece.unit)
    mass = (effect * x2).sum(-1).clamp_min(SMALLEST_UNIT)
    # Stationary point of ``(tau - e) m / 2 + pbar mean (d - e)^2 / (4 tau)`` in tau and e, m the mass.
    ratio = (0.5 * mass / const.share.clamp_min(SMALLEST_UNIT)).clamp_max(LARGEST_MASS)
    split = (0.5 * const.share * variance / (mass * (1.0 - ratio))).sqrt() / piece.unit
    reference = average / piece.unit + 2.0 * split * ratio
    curve = (curve + e * piece.slope).abs()
    energy = const.budget.frobenius**2 * spread_eigenvalue(curve, rows.weight, rows.reach, bisections=ROUGH)
    eps = (energy * query / (curve * x2).sum(-1).clamp_min(SMALLEST_UNIT)).sqrt()[..., None].expand_as(x2)
    s1 = ((rows.weight * t2[:, None, :]).sum(-1) / query).sqrt() / functional.value_norm
    s2 = (mixed / query).sqrt()

    def join(old: Tensor, new: Tensor) -> Tensor:
        return old.log().lerp(new.clamp(*LIMITS).log(), step).exp().clamp(*LIMITS)

    return Parameters(
        split=join(par.split, split).clamp(0.02, 2.0),
        reference=(1.0 - step) * par.reference + step * reference,
        value=(1.0 - step) * par.value + step * t / (functional.value_norm * const.budget.frobenius),
        pair=join(par.pair, pair),
        bilinear=join(par.bilinear, eps).clamp(0.02, 2.0),
        query_value=join(par.query_value, s1),
        query_mean=join(par.query_mean, s2),
        gauge=join(par.gauge, gauge),
    )
