"""Reference moves: what the majorant is worth at them, and parameters that make it sharp there. Nothing is claimed."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.majorant import (
    LIMITS,
    Coefficients,
    Parameters,
    Pieces,
    mass_curve,
    value_reference,
)
from attnrobust.certify.margin.quadratic_form import (
    FunctionalRows,
    LinearImages,
    linear_images,
    of_keys,
    query_form,
    with_keys,
)
from attnrobust.numerics.eigenvalues import spread_eigenvalue
from attnrobust.numerics.rounding import SMALLEST_UNIT

LARGEST_MASS = 0.5  # of a row's remainder at the reference moves, as a share of its bound
ROUGH = 3  # bisections of an eigenvalue that only chooses a parameter


@dataclass(frozen=True, eq=False)
class References:
    """What the balance needs of reference moves; no parameter and no radius changes it.

    Args:
        x: ``l_j.Delta``.
        t: ``gamma.delta_j``.
        query: ``|A^T delta_i|^2``, or N(delta_i).
        gram: ``delta_i.delta_j``, or of rows on their own the moves themselves (b, n, d).
        alone: Which of both.
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

    def form(self, left: Float[Tensor, "h q n"], right: Float[Tensor, "h q n"]) -> Float[Tensor, "b h q"]:
        """``sum_jl left_j right_l delta_j.delta_l``."""
        sums = left @ self.gram[:, None]
        return (sums * (right @ self.gram[:, None] if self.alone else right)).sum(-1)

    def own(self, at: Int[Tensor, "q"]) -> Float[Tensor, "b q"]:
        """``|delta_i|^2`` of the tokens of the rows."""
        return self.gram[:, at].square().sum(-1) if self.alone else self.gram.diagonal(dim1=1, dim2=2)[:, at]

    def followed_by(self, other: "References", *, keep: int) -> "References":
        """The last ``keep`` moves of both."""
        pairs = ((self.x, other.x), (self.t, other.t), (self.query, other.query), (self.gram, other.gram))
        x, t, query, gram = (torch.cat([old, new])[-keep:] for old, new in pairs)
        return References(x, t, query, gram, self.alone)


@dataclass(frozen=True, eq=False)
class Moments:
    """What the majorant's value at moves needs of them.

    Args:
        seen: What a balance needs too.
        d: ``D.Delta``.
        pairs: ``s delta_i w_q . delta_j w_k``, turned.
        keys: Rotary positions: ``delta_j w_k``, turned; else None.
        sizes: Squared lengths of the rows of the moves.
    """

    seen: References
    d: Float[Tensor, "b h q"]
    pairs: Float[Tensor, "b h q n"]
    keys: Float[Tensor, "b g n k"] | None
    sizes: Float[Tensor, "b m"]


def references(functional: FunctionalRows, points: Float[Tensor, "b m p"]) -> References:
    """Evaluate reference moves."""
    return _seen(functional, points, linear_images(functional, points))


def _seen(functional: FunctionalRows, points: Tensor, found: LinearImages) -> References:
    rows = functional.rows
    query = (query_form(rows, found.query) * found.query).sum(-1)
    tokens, alone = rows.tokens_of(points), rows.at is not None
    return References(found.x, found.t, query, tokens if alone else tokens @ tokens.mT, alone)


def moments(functional: FunctionalRows, points: Float[Tensor, "b m p"]) -> Moments:
    """Evaluate moves that vanish on tokens which may not move."""
    found, rows = linear_images(functional, points), functional.rows
    keys = None if rows.layer.rotary is None else found.key
    pairs = rows.layer.factor * with_keys(rows, found.query, found.key)
    return Moments(_seen(functional, points, found), found.d, pairs, keys, points.square().sum(-1))


def value_at(functional: FunctionalRows, found: Coefficients, moments: Moments) -> Float[Tensor, "b"]:
    """``constant + G'.D + D M D / 2`` at moves D, from their linear images alone: no product with M."""
    pi, moved, at = functional.pooling, found.moved.weighted_advantage, moments.seen
    average = (functional.rows.weight @ at.t[..., None])[..., 0]
    d = (moved * at.x).sum(-1) - average
    pairwise = at.x * (0.5 * found.square * at.x - found.mixed * at.t[..., None, :] - found.shifted)
    pairwise = pairwise + moved * pi[:, None] * moments.pairs
    tokenwise = at.t * (0.5 * found.value * at.t - found.linear)
    rowwise = pi * moments.d - 0.5 * found.centre * average**2 + 0.5 * found.bilinear * at.query
    rowwise = rowwise + found.first * d * (0.5 * d - found.offset)
    if moments.keys is None:
        rowwise = rowwise + 0.5 * at.form(found.outer, moved)
    value = found.constant + pairwise.sum((1, 2, 3)) + tokenwise.sum((1, 2)) + rowwise.sum((1, 2))
    if found.steady is None or moments.keys is None:
        return value
    rows, keys = functional.rows, moments.keys
    sums = (of_keys(rows, found.outer, keys) / rows.gauge[:, None] * of_keys(rows, moved, keys)).sum((1, 2, 3))
    return value + 0.5 * (sums + (found.steady * moments.sizes).sum(-1))


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
    weighted = functional.revalued(value_reference(functional, const, par)).weighted_advantage

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
    mixed = mean(found.form(weighted, weighted).clamp_min(0.0), (1,))
    pair = (t2[:, None, :] / x2).sqrt() / functional.value_norm[..., None]
    e = par.pair * functional.value_norm[..., None]
    curve, effect = mass_curve(functional, const, par, piece.unit)
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
