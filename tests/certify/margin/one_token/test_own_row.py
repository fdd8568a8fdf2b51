"""The own row of the moving token is the formula of Theorem 1."""

from functools import partial

import pytest
import torch

from attnrobust.certify.margin.one_token.descent import named
from attnrobust.certify.margin.one_token.method import TokenBound
from attnrobust.certify.margin.one_token.own_row import own_form, own_start
from tests.margin_problems import any_token, perturbed
from tests.stress import Draw


@pytest.mark.parametrize("seed", range(12))
def test_own_row_is_the_formula_of_theorem_1(seed: int) -> None:
    """Every term of the own row, evaluated from its definition at random moves and parameters."""
    problem, draw = any_token(seed), Draw(seed)
    bound = TokenBound(problem).functionals[0]
    radius = 0.3 * float(problem.clean.points.norm()) / problem.clean.n**0.5
    found = bound.at_radius(radius, bound.tokens)
    assert found is not None
    group, const, rows = found.group, found.own, bound.functional.rows
    par = named(own_start(torch.ones_like(found.average)), partial(perturbed, draw))
    form = own_form(group, const, par)
    matrix = rows.layer.factor * rows.layer.w_q @ rows.layer.w_k.mT
    moves = draw.normal(problem.clean.n, problem.clean.width)
    for token, delta in enumerate(moves):
        w, v, o = rows.weight[:, token], bound.functional.advantage[:, token], rows.own[:, token]
        raw = rows.alpha @ delta
        raw[:, token] += rows.beta[:, token] @ delta
        x, t = raw - (w * raw).sum(-1, keepdim=True), bound.functional.gamma @ delta
        query = (matrix.mT @ delta).square().sum(-1)
        quadratic = torch.einsum("d,hde,e->h", delta, matrix, delta)
        length, unit = bound.functional.value_norm[:, 0], radius * group.own_gradient_norm[:, token]
        theta, omega, tau = (
            par.value[:, token] * radius * length,
            par.reference[:, token] * unit,
            par.split[:, token] * unit,
        )
        first, same, share = const.slope[:, token], const.slope_same[:, token], const.share[:, token]
        eta = torch.minimum(w[:, token], 0.5 * (same - first).clamp_min(0.0))
        kappa, pair = torch.maximum(first + eta, same - eta), par.pair[:, token] * length
        moved = v.clone()
        moved[:, token] -= theta
        centred = moved - (w * moved).sum(-1, keepdim=True)
        nu = moved + (tau - omega)[:, None]
        curve = torch.where(nu > 0, nu * const.saturating[:, token], nu * const.curvature[:, token])
        curve[:, token] += pair * kappa
        eps = par.bilinear[:, token, None].expand_as(curve)
        eps = torch.where(curve > 0, eps, -eps.clamp_max(1.0))
        rest = curve * (1.0 + 1.0 / eps)
        drop_first = (moved * w * x).sum(-1) - w[:, token] * t
        s1, s2 = par.query_value[:, token] * length, par.query_mean[:, token]
        kept, jump = w[:, token] - eta, o[:, token].abs() * radius
        weighted = w[:, token] * centred[:, token]
        twice = (
            (curve * (1.0 + eps) * x**2).sum(-1) - 2.0 * kept * x[:, token] * t + 2.0 * weighted * quadratic
            + share / (2.0 * tau) * (drop_first - omega) ** 2 + (kappa / pair + kept * jump / s1) * (t - theta) ** 2
            + query * (radius**2 * (rest * o**2).sum(-1) + kept * jump * s1 + share * weighted.abs() * s2)
            + share * weighted.abs() / s2 * delta.square().sum() - 2.0 * eta * theta * x[:, token]
        )  # fmt: skip
        y = torch.einsum("d,hda->ha", delta, group.basis)
        ours = form.constant[:, token] + (form.linear[:, token] * y).sum(-1)
        ours = ours + 0.5 * torch.einsum("ha,hab,hb->h", y, form.core[:, token], y)
        ours = ours + 0.5 * form.identity[:, token] * delta.square().sum()
        size = form.core[:, token].abs().amax((-2, -1)) * y.square().sum(-1) + ours.abs()
        assert float(((ours - 0.5 * twice).abs() / size).amax()) <= 1e-10
