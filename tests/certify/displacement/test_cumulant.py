"""Bounds of third cumulants of the displacement certificate."""

import pytest
import torch

from attnrobust.certify.displacement.cumulant import cumulant_modulus, psd_roots
from tests.assertions import assert_close


@pytest.mark.parametrize("seed", range(6))
def test_cumulant_modulus_dominates_every_direction(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, v = 2 + seed, 1 + seed % 4
    weights = torch.softmax(3.0 * torch.randn(n, generator=generator, dtype=torch.float64), dim=0)
    values = torch.randn(n, v, generator=generator, dtype=torch.float64)
    spread = values - weights @ values
    modulus, root = cumulant_modulus(weights, spread)
    assert_close(root @ root, modulus, rtol=1e-12, what="the root of the modulus")
    centre = torch.eye(n, dtype=torch.float64) - weights[None, :]
    for _ in range(50):
        direction = torch.nn.functional.normalize(torch.randn(v, generator=generator, dtype=torch.float64), dim=0)
        cumulant = centre.T @ torch.diag(weights * (spread @ direction)) @ centre
        for sign in (1.0, -1.0):
            lowest = torch.linalg.eigvalsh(modulus + sign * cumulant)[0]
            assert float(lowest) >= -1e-12 * float(modulus.abs().max())
    if v == 1:  # one output direction: the modulus of the matrix itself, nothing larger
        exact = psd_roots(cumulant @ cumulant)[0]
        assert_close(modulus, exact, rtol=1e-7, what="modulus of one direction")
