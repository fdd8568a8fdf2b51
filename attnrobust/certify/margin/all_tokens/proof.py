"""The proof of one bound: from any parameters at all to an upper bound of the drop, in float64."""

import math

import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.choice import Choice
from attnrobust.certify.margin.all_tokens.constants import Constants
from attnrobust.certify.margin.all_tokens.majorant import majorant, pieces
from attnrobust.certify.margin.all_tokens.region import Coordinates, Ellipsoid, ellipsoid
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.certify.margin.trust_region import (
    CHOLESKY_LIMIT,
    DECOMPOSE_LIMIT,
    Quadratic,
    approximate,
    decomposed_bound,
    factorised_bound,
    followed,
    iterated_bound,
)
from attnrobust.numerics.chance import Chance, stream
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import MoveThreat

EXPANSIONS = 30  # of the span of the moves that a search hands over, at most
SHARP = 5e-5  # growth of an approximate value by one more product that ends its search


def proved_drop(
    rows: FunctionalRows,
    threat: MoveThreat,
    const: Constants,
    choice: Choice,
    *,
    chance: Chance,
    coordinates: Coordinates | None = None,
) -> Upper:
    """Upper bound of ``sup drop(D)`` over the set of the constants (Theorem 1 of docs/margin-certificate.md).

    It holds for every choice: parameters and scale are free in the inequalities, moves are where an approximate
    solution starts, from which weak duality bounds the maximum.

    Args:
        rows: The functional.
        threat: The threat.
        const: Constants of its set of one radius.
        choice: What a search found, or anything else.
        chance: Pays for the random starts of eigenvalue bounds.
        coordinates: What the trust region is about, where that is not the moves themselves.
    """
    choice = choice.admissible
    form = majorant(rows, const, pieces(rows, const, rows.first_norm), choice.parameters)
    if not form.finite:
        return Upper(math.inf)
    region = ellipsoid(threat, const.budget, choice.scale)
    coordinates = coordinates or Coordinates(rows.rows)
    quadratic = coordinates.quadratic(form, region)
    starts = None if choice.moves is None else coordinates.again(choice.moves, region)
    return _maximum(quadratic, region, starts, chance)


def _maximum(quadratic: Quadratic, region: Ellipsoid, starts: Tensor | None, chance: Chance) -> Upper:
    """Upper bound of the majorant over the ellipsoid."""
    size = quadratic.gradient.numel()
    if size <= DECOMPOSE_LIMIT:
        return decomposed_bound(quadratic, region.radius)[0]
    if starts is None:
        guess = approximate(quadratic, region.radius, _random_start(quadratic, chance), settled=SHARP)
    else:
        guess = followed(quadratic, region.radius, starts, expansions=EXPANSIONS, settled=SHARP)
    if size <= CHOLESKY_LIMIT:
        return factorised_bound(quadratic, region.radius, guess)
    share, seed = chance.next_event()
    found = iterated_bound(quadratic, region.radius, guess, failure_probability=share, seed=seed)
    chance.spend(found.failure_probability)
    return found


def _random_start(quadratic: Quadratic, chance: Chance) -> Tensor:
    generator = torch.Generator().manual_seed(stream(chance.seed, chance.purpose, "starts"))
    start = torch.randn(1, quadratic.gradient.numel(), generator=generator, dtype=torch.float64)
    return start.to(quadratic.gradient)
