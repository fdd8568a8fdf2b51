"""The table of every Lipschitz bound of a layer: values, regions, conditions, and how tight they are."""

import math

from attnrobust.certify.closed_form.claims import Quantity
from attnrobust.errors import InputError
from attnrobust.layers.token_map import TokenMap
from attnrobust.lipschitz.lower_bounds import lower_bounds
from attnrobust.lipschitz.question import checked
from attnrobust.lipschitz.records import BoundRow, BoundsTable, LowerRow
from attnrobust.lipschitz.upper_bounds import claims
from attnrobust.results import Kind, NotApplicable
from attnrobust.threats.moves import FrobeniusBall, MoveThreat
from attnrobust.tokens import TokenMeasure

__all__ = ["BoundRow", "BoundsTable", "LowerRow", "Quantity", "bounds_table"]


def bounds_table(
    network: TokenMap,
    clean: TokenMeasure | None = None,
    *,
    n: int | None = None,
    radius: float | None = None,
    epsilon: float | None = None,
    threat: MoveThreat | None = None,
    seed: int = 0,
    search: int | None = None,
) -> BoundsTable:
    """Evaluate every Lipschitz bound of the field on one layer, beside the best lower bounds found.

    Bounds on a ball need its radius R and the token count; bounds at an input or around it need the input. A ratio
    compares a bound with what derivatives (and an attack, for finite moves) reach for the same quantity on the same
    set: 1 is perfect, and below 1 would be a violation.

    Args:
        network: The layer: dot-product, L2, cosine, sigmoid, LipschitzNorm or kernel attention; of any other map the
            derivative at X is bounded, and the rest is listed with the reason why it does not apply.
        clean: The input X, or None.
        n: Token count where there is no input.
        radius: R; None means the largest token norm of the input.
        epsilon: Size of the finite moves around X; None means 1 % of the Frobenius norm of X.
        threat: How finite moves are measured; None means the Frobenius norm of all tokens.
        seed: Seed of start vectors, random inputs and the attack.
        search: Steps of the ascent that looks for large derivatives in the ball; None means 40 for small layers (token
            count times width at most 256) and none for larger ones, where it takes minutes.

    Returns:
        The table: what applies (in each quantity the smallest first), lower bounds, what does not apply and why.

    Raises:
        InputError: Neither an input nor a radius with a count, numbers that are not positive, or contradictions.

    Examples:
        >>> import torch
        >>> from attnrobust.layers.attention import Attention
        >>> w = torch.ones(1, 1, 1)
        >>> table = bounds_table(Attention(w_q=w, w_k=-w, w_v=w, scale=1.0), n=2, radius=1.0, search=0)
        >>> [(row.name, round(row.value, 3)) for row in table.bounds if row.quantity == Quantity.BALL]
        [('castin2024-derived', 3.828), ('castin2024-reported', 5.745)]
    """
    question = checked(network, clean, n, radius, epsilon, FrobeniusBall() if threat is None else threat, seed, search)
    lowers = sorted(lower_bounds(question), key=lambda row: (list(Quantity).index(row.quantity), -row.value))
    best: dict[Quantity, float] = {}
    for row in lowers:
        best.setdefault(row.quantity, row.value)
    found, skipped = [], []
    for claim in claims(question):
        try:
            upper = claim.upper(question)
        except InputError as error:
            skipped.append(NotApplicable(method=claim.name, reason=str(error)))
            continue
        lower = best.get(claim.quantity, 0.0)
        found.append(
            BoundRow(
                name=claim.name,
                quantity=claim.quantity,
                region=claim.region,
                conditions=claim.conditions,
                reference=claim.reference,
                kind=Kind.PROBABILISTIC if upper.failure_probability > 0 else claim.kind,
                failure_probability=upper.failure_probability,
                value=upper.value,
                ratio=upper.value / lower if lower > 0 and math.isfinite(upper.value) else None,
            )
        )
    asked = {row.quantity for row in found}
    return BoundsTable(
        layer=type(network).__name__,
        n=question.n,
        width=network.width,
        radius=question.radius,
        epsilon=question.epsilon,
        bounds=tuple(sorted(found, key=lambda row: (list(Quantity).index(row.quantity), row.value))),
        lower_bounds=tuple(row for row in lowers if row.quantity in asked),
        skipped=tuple(dict.fromkeys(skipped)),
    )
