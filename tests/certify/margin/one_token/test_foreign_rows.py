"""The quadratic above the row of another token."""

from functools import partial

import pytest
import torch

from attnrobust.certify.margin.one_token.descent import named
from attnrobust.certify.margin.one_token.foreign_rows import PROOF_NODES, foreign_constant, foreign_start
from attnrobust.certify.margin.one_token.logistic import logistic_change
from attnrobust.certify.margin.one_token.method import TokenBound
from tests.margin_problems import any_token, perturbed
from tests.stress import Draw


@pytest.mark.parametrize("seed", range(12))
def test_quadratic_above_a_foreign_row(seed: int) -> None:
    """Theorem 2: no (a, t) of the box lies above it, and some point lies just below it."""
    problem = any_token(seed)
    draw = Draw(seed)
    bound = TokenBound(problem).functionals[0]
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.1, 1.0, 4.0):
        found = bound.at_radius(share * scale, bound.tokens)
        if found is None:
            continue
        rows = found.foreign
        par = named(foreign_start(rows), partial(perturbed, draw))
        constant = foreign_constant(rows, par, nodes=PROOF_NODES) / rows.size
        grid = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)
        a, t = grid[:, None], grid[None, :]
        x, v, reach, lift, size = (
            q[..., None, None] for q in (rows.logit, rows.value, rows.reach, rows.lift, rows.size)
        )
        p, moved = torch.sigmoid(x), torch.sigmoid(x + a * reach)
        row = (logistic_change(x, a * reach) * v - moved * t * lift) / size
        tilt, curve, lean, mixed, spread = (
            q[..., None, None] for q in (par.tilt, par.curve, par.lean, par.mixed, par.spread)
        )
        linear = (p * torch.sigmoid(-x) * v * reach * a - p * lift * t) / size + tilt * a + lean * t
        above = row - linear - 0.5 * curve * a**2 - mixed * a * t - 0.5 * spread * t**2
        largest = above.flatten(-2).amax(-1)
        weight = 1.0 + par.curve.abs() + par.tilt.abs() + par.lean.abs() + par.mixed.abs() + par.spread
        assert float(((largest - constant) / weight).amax()) <= 1e-13
        loose = torch.where(rows.reach < 6.0, (constant - largest) / weight, 0.0)  # beyond, nodes lie far apart
        assert float(loose.amax()) <= 0.01
