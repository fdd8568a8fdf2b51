"""Suprema of the exponential remainder's quotients: above every value on a fine grid, and sharp."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.numerics import suprema
from attnrobust.numerics.exponential import log_psi
from attnrobust.numerics.suprema import growing_weight, pair_slope, saturating_weight
from tests.stress import Draw

WEIGHTS = (0.0, -1e-9, -1e-3, -0.7, -3.0, -7.0, -30.0, -200.0, -460.0)
LIMITS = (0.0, 1e-9, 1e-4, 0.01, 0.5, 0.8, 3.0, 4.0, 30.0, 40.0, 470.0, 900.0)


def pairs() -> tuple[Tensor, Tensor]:
    """Weights of every size at limits of every size, drawn and named."""
    draw = Draw(0)
    log_w = torch.cat([-5.0 * draw.normal(300).abs(), -30.0 * draw.normal(60).abs(), -300.0 * draw.normal(40).abs()])
    limit = torch.cat([10 ** (0.7 * draw.normal(300)), 40.0 * draw.normal(60).abs(), 200.0 * draw.normal(40).abs()])
    grid = torch.cartesian_prod(torch.tensor(WEIGHTS).double(), torch.tensor(LIMITS[1:]).double())
    return torch.cat([log_w, grid[:, 0]]), torch.cat([limit, grid[:, 1]])


def quotients(log_w: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Largest values of the two quotients on a grid of (0, limit] that is dense near 0 and near the limit."""
    steps = torch.cat([torch.logspace(-6, 0, 1500), torch.linspace(1e-3, 1.0, 3000)]).double()
    u = limit[:, None] * steps
    share = log_w[:, None] + log_psi(u)
    log_s = share - torch.logaddexp(torch.zeros_like(share), share)
    curve = (log_s + math.log(2.0) - 2.0 * u.log()).exp().amax(-1)
    return curve, ((log_s - u.log()).exp() * (1.0 - log_w.exp()[:, None] * u).clamp_min(0.0)).amax(-1)


def test_suprema_are_upper_bounds_and_sharp() -> None:
    """Also where w is 1e-200 and the limit above 300: an upper bound clamped at e^300 fails there."""
    log_w, limit = pairs()
    curve, ramp = quotients(log_w, limit)
    found, slope = saturating_weight(log_w, limit), pair_slope(log_w, limit)
    assert bool((found >= curve * (1.0 - 1e-12)).all())
    assert bool((found >= log_w.exp()).all())
    assert bool((slope >= ramp * (1.0 - 1e-12)).all())
    assert float((found / torch.maximum(curve, log_w.exp())).max()) < 1.01
    assert float((slope / ramp).max()) < 1.01


@pytest.mark.parametrize("steps", [0, 1])
def test_an_enclosure_that_is_not_narrow_only_widens_the_bound(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suprema, "NEWTON_STEPS", steps)
    log_w, limit = pairs()
    curve, ramp = quotients(log_w, limit)
    assert bool((saturating_weight(log_w, limit) >= curve * (1.0 - 1e-12)).all())
    assert bool((pair_slope(log_w, limit) >= ramp * (1.0 - 1e-12)).all())


def test_the_quotients_rise_to_one_peak() -> None:
    """F1 and F2 of lemma 3: the coefficients of their series in closed form, and the sign that follows from them."""
    for k in range(4, 80):
        first = (k - 6) * 2 ** (k - 1) + k * (k - 1) + 6
        second = (k - 6) * 3 ** (k - 1) + (k * (k - 1) - 4 * k + 24) * 2 ** (k - 2) - (k * k - 2 * k + 6)
        assert first > 0
        assert second > 0
    for u in (0.3, 1.0, 3.0, 10.0):
        e = math.exp(u)
        p, q = e - 1.0 - u, e - 1.0
        first = (u - 3.0) * e**2 + (u * u + 6.0) * e - (u + 3.0)
        assert first == pytest.approx(2.0 * u * q * q - 3.0 * p * q - u * p * e, rel=1e-6)
        second = (u - 2.0) * e**3 + (u * u - 2.0 * u + 6.0) * e**2 + (u - u * u - 6.0) * e + 2.0
        parts = (u * q - p) * (2.0 * p * q + 2.0 * u * q + u * u * e) - u * e * (p * p + u * u * q)
        assert second == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize("log_w", [0.0, -1e-3, -1.0, -7.0, -200.0, -460.0])
@pytest.mark.parametrize("limit", [0.0, 1e-4, 0.5, 3.0, 30.0, 470.0])
def test_growing_weight_covers_every_logit(log_w: float, limit: float) -> None:
    """The least normaliser that a logit u of a token of weight w allows is ``max(1 + w psi(u), w e^u)``."""
    bound = growing_weight(torch.tensor([log_w], dtype=torch.float64), torch.tensor([limit], dtype=torch.float64))
    assert float(bound) >= math.exp(log_w)
    u = torch.linspace(-1.0, 1.0, 8001, dtype=torch.float64) * limit
    u = u[u.abs() > 0]
    if len(u) == 0:
        assert float(bound) == pytest.approx(math.exp(log_w), rel=3e-12)
        return
    rise = torch.where(u > 0, u + torch.log1p(-torch.exp(-u.abs())), torch.log(-torch.expm1(-u.abs())))
    normaliser = torch.maximum(torch.nn.functional.softplus(log_w + log_psi(u.abs())), log_w + u)
    normaliser = torch.where(u > 0, normaliser, torch.zeros_like(u))  # 1 + P >= 1
    quotient = (log_w + rise - normaliser - u.abs().log()).exp()
    assert float(bound) >= float(quotient.max()) * (1 - 1e-12)
    coarse = 2.0 if limit <= 30.0 else 15.0
    assert float(bound) <= coarse * max(float(quotient.max()), math.exp(log_w)), "the cells are too coarse to be useful"


def test_hidden_tokens_have_none() -> None:
    hidden = torch.tensor([-math.inf], dtype=torch.float64)
    for limit in (0.0, 1.0, 50.0):
        for supremum in (saturating_weight, pair_slope, growing_weight):
            assert float(supremum(hidden, torch.tensor([limit], dtype=torch.float64))) == 0.0
