"""The exponential remainder against high precision and series, near 0, far from it and in log space."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from attnrobust.numerics.exponential import (
    largest_remainder,
    log_phi,
    log_psi,
    phi_negative,
    psi,
    psi_slope_negative,
    weighted_phi,
)
from tests.assertions import assert_close
from tests.stress import Draw

POINTS = (1e-6, 1e-3, 3e-3, 9.999e-3, 1.001e-2, 0.3, 1.0, 7.0, 29.0, 39.9, 40.1, 300.0, 400.0)


def exact(u: float) -> Decimal:
    """``e^u - 1 - u`` to 60 digits."""
    getcontext().prec = 60
    return Decimal(u).exp() - 1 - Decimal(u)


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_psi_phi_and_their_logarithms_against_high_precision() -> None:
    u = column(list(POINTS))
    log_exact = column([float(exact(x).ln()) for x in POINTS])
    assert_close(log_psi(u), log_exact, rtol=1e-14, atol=1e-12, what="log psi")
    phi_exact = column([float((2 * exact(x) / Decimal(x) ** 2).ln()) for x in POINTS])
    assert_close(log_phi(u), phi_exact, rtol=1e-14, atol=1e-12, what="log phi")
    below = column([float(exact(-x)) for x in POINTS])
    assert_close(psi(-u), below, rtol=1e-12, what="psi of negative numbers")
    assert_close(psi(u), column([float(exact(x)) for x in POINTS]), rtol=1e-12, what="psi")
    assert_close(phi_negative(u), 2.0 * below / u**2, rtol=1e-12, what="phi of negative numbers")
    assert_close(psi_slope_negative(u), below / u, rtol=1e-12, what="psi(-u) / u")


def test_the_ends_at_zero_and_far_away() -> None:
    zero, huge = torch.zeros(1, dtype=torch.float64), column([1e5])
    assert float(log_phi(zero)) == 0.0
    assert float(phi_negative(zero)) == 1.0
    assert float(psi_slope_negative(zero)) == 0.0
    assert float(psi(zero)) == 0.0
    assert float(log_psi(zero)) == -math.inf
    assert 0.0 < float(phi_negative(huge)) < 2.1e-5
    assert abs(float(log_psi(huge)) - 1e5) < 1e-6


def test_a_weighted_value_that_overflows_is_infinite_and_a_hidden_token_has_none() -> None:
    assert math.isinf(float(weighted_phi(column([0.0]), column([700.0]))))
    assert float(weighted_phi(column([-math.inf]), column([5.0]))) == 0.0
    assert float(weighted_phi(column([-460.0]), column([480.0]))) == pytest.approx(2.0 * math.exp(20.0) / 480.0**2)


def test_largest_remainder_of_centred_changes() -> None:
    draw = Draw(5)
    for spread in (0.0, 1.0, 8.0):
        weight = torch.softmax(spread * draw.normal(40, 5), dim=-1)
        limit = 4.0 * draw.normal(40, 5).abs()
        bound = largest_remainder(weight, limit)
        best = torch.zeros(40, dtype=torch.float64)
        for _ in range(300):
            u = limit * (draw.normal(40, 5).sign() if draw.between(0.0, 1.0) < 0.7 else draw.normal(40, 5).clamp(-1, 1))
            up, down = (weight * u.clamp_min(0.0)).sum(-1), (weight * (-u).clamp_min(0.0)).sum(-1)
            least = torch.minimum(up, down)  # the larger side shrinks until the mean is 0
            factor = torch.where(u > 0.0, (least / up)[:, None], (least / down)[:, None]).nan_to_num(0.0)
            best = torch.maximum(best, (weight * psi(u * factor)).sum(-1))
        assert bool((best <= bound).all())
        assert float((best / bound).amax()) > 0.9
    equal = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert float(largest_remainder(equal, 12.0 * equal)) == pytest.approx(math.cosh(3.0) - 1.0, rel=1e-9)
    huge = largest_remainder(equal, torch.full((1, 4), 640.0, dtype=torch.float64))
    assert torch.isfinite(huge).all()
