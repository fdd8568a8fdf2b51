"""What the experiments about growth in the number of tokens share: norms at inputs, ascent, exponents."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.lipschitz.at_an_input import local_norm_upper
from attnrobust.lipschitz.derivative import derivative_norm
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.reports.curves import Curve
from attnrobust.reproduce.experiment import Row, Value, column
from attnrobust.reproduce.fits import PowerLaw, power_law
from attnrobust.tokens import TokenMeasure

ACCURACY = 1e-2
"""Relative accuracy of the norms; each is a lower bound."""
RESTARTS = 3
FEWEST = 3
"""Points of a fit."""


def at_tokens(
    attention: Attention, points: Float[Tensor, "n d"], radius: float, *, seed: int, local: bool, **about: Value
) -> Row:
    """Norm of the derivative at tokens in a ball from below, the ball's constant, and the bound at the tokens."""
    jacobian = AttentionJacobian(attention, points, None)
    found = largest_singular_value_lower(jacobian.linear_map(), seed=seed, tol=ACCURACY)[0].value
    n = int(points.shape[0])
    row: Row = {**about, "n": n, "radius": radius, "found": found, "upper": ball_constant(attention, n, radius).value}
    return row | {"local_upper": local_norm_upper(jacobian).value} if local else row


def adversarial(
    attention: Attention, lengths: Sequence[int], radius: float, *, steps: int, seed: int, **about: Value
) -> list[Row]:
    """The largest derivative that ascent finds on n tokens in the ball: one token against n - 1 equal ones."""
    rows: list[Row] = []
    for n, (_, found) in two_places(attention, lengths, radius, steps=steps, seed=seed).items():
        upper = ball_constant(attention, n, radius).value
        rows.append({**about, "n": n, "radius": radius, "found": found, "upper": upper})
    return rows


def two_places(
    attention: Attention, lengths: Sequence[int], radius: float, *, steps: int, seed: int
) -> dict[int, tuple[Float[Tensor, "2 d"], float]]:
    """For every n: where one token and n - 1 equal ones have a large derivative, and its norm from below.

    The two places are atoms of masses 1/n and (n-1)/n, whose weighted derivative is a part of the n tokens' own. Every
    length has its ascent; then it takes what was found for any length if that is better.
    """
    size = radius * (1.0 - 1e-15)  # so that no rounding leaves the ball
    centre = torch.zeros(2, attention.width, dtype=torch.float64)
    found = [
        lipschitz_search(
            attention, centre, size, masses=_masses(n), planted=False, restarts=RESTARTS, steps=steps, seed=seed
        )
        for n in lengths
    ]
    best = {}
    for n in lengths:
        values = [derivative_norm(attention, TokenMeasure(one.tokens.points, _masses(n))).value for one in found]
        winner = max(range(len(found)), key=values.__getitem__)
        best[n] = found[winner].tokens.points, values[winner]
    return best


def _masses(n: int) -> Float[Tensor, "2"]:
    return torch.tensor([1.0, n - 1.0], dtype=torch.float64) / n


def random_tokens(like: Float[Tensor, "n d"], *, seed: int) -> Float[Tensor, "n d"]:
    """Tokens of the same norms in random directions."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norms = torch.linalg.vector_norm(like, dim=-1, keepdim=True)
    scaled: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True) * norms
    return scaled


def exponent(rows: Sequence[Row], **where: Value) -> PowerLaw | None:
    """The exponent of the found norm in n; None where there are too few points."""
    n, found = column(rows, "n", **where), column(rows, "found", **where)
    return power_law(n, found) if len(set(n)) >= FEWEST else None


def fitted(law: PowerLaw | None, label: str, colour: int) -> list[Curve]:
    """A fitted line with its band."""
    if law is None:
        return []
    x = sorted(set(law.x))
    line, low, high = zip(*(law.at(value) for value in x), strict=True)
    return [Curve(label=f"{label}: n^{law}", x=x, y=line, style="-", low=low, high=high, colour=colour)]
