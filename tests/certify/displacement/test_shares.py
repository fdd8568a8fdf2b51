"""Shares of the joint bound: near the best ones, beside a lower bound of what any can reach."""

import math

import pytest
import torch

from attnrobust.certify.displacement.shares import FLOOR, balanced_shares


def test_balanced_shares_reach_the_least_worst_case() -> None:
    one = torch.tensor([[4.0, 1.0, 0.0]], dtype=torch.float64)
    shares, least = balanced_shares(one)
    assert least == pytest.approx(3.0)
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3, FLOOR], rel=1e-9)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        parts = torch.rand(3, 2, generator=generator, dtype=torch.float64) ** 4
        shares, least = balanced_shares(parts)
        grid = torch.linspace(1e-3, 1.0 - 1e-3, 5000, dtype=torch.float64)
        worst = (parts[:, :1] / grid + parts[:, 1:] / (1.0 - grid)).amax(dim=0)
        assert least <= math.sqrt(float(worst.min())) * (1 + 1e-9), "the lower bound is one"
        found = float(((parts / shares).sum(dim=1)).max() * shares.sum())
        assert found <= 1.05 * float(worst.min())
