"""Scalar functions and cumulant bounds of the displacement certificate, each lemma by itself."""

import math

import pytest
import torch

from attnrobust.certify.displacement.scalar import (
    cumulant_modulus,
    growing_weight,
    log_phi,
    log_psi,
    phi_negative,
    psd_root,
    saturating_weight,
)
from tests.assertions import assert_close

POINTS = (1e-6, 3e-3, 9.999e-3, 1.001e-2, 0.3, 1.0, 7.0, 39.9, 40.1, 300.0)


def _phi_by_series(u: float) -> float:
    """``2 (e^u - 1 - u) / u^2`` as a sum of terms of one sign after scaling by e^{-u}, by fsum."""
    if u < -30.0:
        return 2.0 * (math.exp(u) - 1.0 - u) / u**2
    terms, term = [], 1.0
    for k in range(3, 1200):
        terms.append(term)
        term *= u / k
    return math.fsum(terms)


def test_phi_and_psi_match_their_series() -> None:
    u = torch.tensor(POINTS, dtype=torch.float64)
    exact = torch.tensor([math.log(_phi_by_series(x)) for x in POINTS], dtype=torch.float64)
    assert_close(log_phi(u), exact, rtol=1e-14, atol=1e-12, what="log phi")
    assert_close(log_psi(u), exact + 2.0 * u.log() - math.log(2.0), rtol=1e-14, atol=1e-12, what="log psi")
    below = torch.tensor([_phi_by_series(-x) for x in POINTS], dtype=torch.float64)
    assert_close(phi_negative(u), below, rtol=0.0, atol=1e-11, what="phi of negative numbers")
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(log_phi(zero)) == 0.0
    assert float(phi_negative(zero)) == 1.0
    assert float(log_psi(zero)) == -math.inf
    huge = torch.tensor([1e5], dtype=torch.float64)
    assert 0.0 < float(phi_negative(huge)) < 2.1e-5
    assert abs(float(log_psi(huge)) - 1e5) < 1e-6


@pytest.mark.parametrize("log_w", [-1e-3, -1.0, -7.0, -200.0, -460.0])
@pytest.mark.parametrize("reach", [1e-4, 0.5, 3.0, 30.0, 470.0])
def test_saturating_weight_covers_every_logit(log_w: float, reach: float) -> None:
    """Also where w is 1e-200 and the reach above 300: an upper bound clamped at e^300 fails there."""
    bound = saturating_weight(torch.tensor([log_w], dtype=torch.float64), torch.tensor([reach], dtype=torch.float64))
    u = torch.linspace(1e-3, 1.0, 4001, dtype=torch.float64) * reach
    share = torch.sigmoid(log_w + log_psi(u))
    quotient = (math.log(2.0) + share.log() - 2.0 * u.log()).exp()
    assert float(bound) >= float(quotient.max()) * (1 - 1e-12)
    assert float(bound) >= math.exp(log_w)
    coarse = 1.6 if reach <= 30.0 else 6.0  # cells span more of the peak where the reach is absurd
    assert float(bound) <= coarse * max(float(quotient.max()), math.exp(log_w)), "the cells are too coarse to be useful"


@pytest.mark.parametrize("log_w", [0.0, -1e-3, -1.0, -7.0, -200.0, -460.0])
@pytest.mark.parametrize("reach", [0.0, 1e-4, 0.5, 3.0, 30.0, 470.0])
def test_growing_weight_covers_every_logit(log_w: float, reach: float) -> None:
    """The least normaliser that a logit u of a token of weight w allows is ``max(1 + w psi(u), w e^u)``."""
    bound = growing_weight(torch.tensor([log_w], dtype=torch.float64), torch.tensor([reach], dtype=torch.float64))
    assert float(bound) >= math.exp(log_w)
    u = torch.linspace(-1.0, 1.0, 8001, dtype=torch.float64) * reach
    u = u[u.abs() > 0]
    if len(u) == 0:
        assert float(bound) == pytest.approx(math.exp(log_w), rel=1e-12)
        return
    rise = torch.where(u > 0, u + torch.log1p(-torch.exp(-u.abs())), torch.log(-torch.expm1(-u.abs())))
    normaliser = torch.maximum(torch.nn.functional.softplus(log_w + log_psi(u.abs())), log_w + u)
    normaliser = torch.where(u > 0, normaliser, torch.zeros_like(u))  # 1 + P >= 1
    quotient = (log_w + rise - normaliser - u.abs().log()).exp()
    assert float(bound) >= float(quotient.max()) * (1 - 1e-12)
    coarse = 2.0 if reach <= 30.0 else 15.0
    assert float(bound) <= coarse * max(float(quotient.max()), math.exp(log_w)), "the cells are too coarse to be useful"


def test_saturating_weight_of_a_masked_token_is_zero() -> None:
    masked = torch.tensor([-math.inf], dtype=torch.float64)
    assert float(growing_weight(masked, torch.tensor([50.0], dtype=torch.float64))) == 0.0
    assert float(saturating_weight(masked, torch.tensor([50.0], dtype=torch.float64))) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_cumulant_modulus_dominates_every_direction(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, v = 2 + seed, 1 + seed % 4
    weights = torch.softmax(3.0 * torch.randn(n, generator=generator, dtype=torch.float64), dim=0)
    values = torch.randn(n, v, generator=generator, dtype=torch.float64)
    spread = values - weights @ values
    modulus = cumulant_modulus(weights, spread)
    centre = torch.eye(n, dtype=torch.float64) - weights[None, :]
    for _ in range(50):
        direction = torch.nn.functional.normalize(torch.randn(v, generator=generator, dtype=torch.float64), dim=0)
        cumulant = centre.T @ torch.diag(weights * (spread @ direction)) @ centre
        for sign in (1.0, -1.0):
            lowest = torch.linalg.eigvalsh(modulus + sign * cumulant)[0]
            assert float(lowest) >= -1e-12 * float(modulus.abs().max())
    if v == 1:  # one output direction: the modulus of the matrix itself, nothing larger
        exact = psd_root(cumulant @ cumulant)
        assert_close(modulus, exact, rtol=1e-7, what="modulus of one direction")
