"""The logistic function of one logit: its remainder, its change and where it turns."""

import decimal

import torch

from attnrobust.certify.margin.one_token.logistic import logistic_change, remainder_range, steepest_turn
from tests.stress import Draw


def test_logistic_remainder_range() -> None:
    draw = Draw(1)
    logit = torch.cat([3.0 * draw.normal(200), 40.0 * draw.normal(50)])
    limit = 10 ** (0.6 * draw.normal(250))
    upper, lower = remainder_range(logit, limit)
    a = limit[:, None] * torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    a = torch.where(a.abs() < 0.02, 0.02, a).clamp(-limit[:, None].clamp_min(0.02), limit[:, None].clamp_min(0.02))
    p = torch.sigmoid(logit)[:, None]
    g = 2.0 * (torch.sigmoid(logit[:, None] + a) - p - p * (1.0 - p) * a) / a**2
    keep = limit > 0.05
    assert bool((upper[keep, None] >= g[keep] - 1e-9).all())
    assert bool((lower[keep, None] <= g[keep] + 1e-9).all())
    assert float((upper - lower).amax()) <= 0.25


def test_logistic_change_keeps_its_digits() -> None:
    draw = Draw(3)
    logit, shift = 40.0 * draw.normal(400), 10 ** (2.0 * draw.normal(400)).clamp(-8.0, 1.5) * draw.normal(400).sign()
    exact = [long_change(float(x), float(a)) for x, a in zip(logit, shift, strict=True)]
    found = logistic_change(logit, shift)
    assert torch.allclose(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0.0)


def long_change(logit: float, shift: float) -> float:
    """``sigma(x + a) - sigma(x)`` with many digits."""
    with decimal.localcontext(prec=120):
        x, a = decimal.Decimal(logit), decimal.Decimal(shift)
        return float(1 / (1 + (-x - a).exp()) - 1 / (1 + (-x).exp()))


def test_steepest_turn() -> None:
    draw = Draw(4)
    logit, limit = 4.0 * draw.normal(300), 10 ** (0.6 * draw.normal(300))
    p = torch.sigmoid(logit[:, None] + limit[:, None] * torch.linspace(-1.0, 1.0, 501, dtype=torch.float64))
    turn = (p * (1.0 - p) * (1.0 - 2.0 * p)).abs().amax(-1)
    assert bool((steepest_turn(logit, limit) >= turn).all())
