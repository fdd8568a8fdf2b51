"""Tolerances of masses let no measure slip into a certified radius: tiny atoms, tiny tokens, sums near 1."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.attacks.measures.goal import MeasureReader
from attnrobust.certify import certify
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.numerics.transport import wasserstein
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.tokens import PerturbedTokens, TokenMeasure


def row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def line(*numbers: float, mass: Tensor) -> TokenMeasure:
    return TokenMeasure(row(*numbers)[:, None], mass)


def loud(slope: float, *, bias: float = 0.0) -> Attention:
    """Width 1, scores ``slope x_j``, values ``x_j + bias``."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Attention(w_q=0.0 * one, w_k=one, w_v=one, b_q=row(slope)[None], b_v=row(bias)[None], scale=1.0)


HALVES = row(0.5, 0.5)
SLIPS: dict[str, tuple[Attention, TokenMeasure, PerturbedTokens, float, MeasureThreat]] = {
    "a tiny atom travels": (
        loud(30.0), line(0.0, 0.1, mass=HALVES),
        PerturbedTokens(row(0.0, 0.1, 2.0)[:, None], row(0.5, 0.5 - 5e-13, 5e-13), torch.tensor([0, 1, 1])),
        0.3, WassersteinBall(math.inf),
    ),
    "a tiny mass travels to another token": (
        loud(31.0), line(0.0, 1.0, mass=row(1 - 1e-15, 1e-15)),
        PerturbedTokens(row(0.0, 1.0)[:, None], row(1 - 9e-13, 9e-13), torch.tensor([0, 1])),
        0.3, WassersteinBall(math.inf),
    ),
    "a tiny token grows": (
        loud(20.0), line(0.0, 1.0, mass=row(1 - 1e-10, 1e-10)),
        PerturbedTokens(row(0.0, 1.0)[:, None], row(1 - 1e-9, 1e-9), torch.tensor([0, 1])),
        0.1, CouplingBall(math.inf),
    ),
    "masses drift and the tolerance is small": (
        loud(0.0), line(0.0, 1.0, mass=HALVES),
        PerturbedTokens(row(0.0, 1.0)[:, None], row(0.5 - 9e-10, 0.5 + 9e-10), torch.tensor([0, 1])),
        1e-10, CouplingBall(math.inf),
    ),
    "mass is missing and the values are large": (
        loud(0.0, bias=1e6), line(0.0, 1.0, mass=HALVES),
        PerturbedTokens(row(0.0, 1.0)[:, None], row(0.5, 0.5 - 5e-10), torch.tensor([0, 1])),
        1e-4, WassersteinBall(2, domain_radius=1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_tolerances_of_masses_are_no_way_into_a_certified_radius(name: str) -> None:
    layer, clean, atoms, tolerance, threat = SLIPS[name]
    problem = Problem(layer, clean, threat, Displacement(tolerance, pool="mean"))
    used = float(MeasureReader(problem, atoms.mass, atoms.parent).usage(atoms.points[None])[0])
    certificates = certify(problem).certificates
    assert max(c.radius for c in certificates) > 0
    for certificate in certificates:
        assert used < 1 or threat.distance(clean, atoms) > certificate.radius, certificate.method


@pytest.mark.parametrize("share", [1e-3, 1e-9, 1e-13])
def test_light_children_near_their_parents_stay_near(share: float) -> None:
    """Rounding of the heavy atoms' masses is not a journey of the light ones."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    mass = torch.softmax(torch.randn(12, dtype=torch.float64, generator=generator), dim=0)
    children = torch.cat([mass * share, mass * (1 - share)])
    moves = torch.nn.functional.normalize(torch.randn(24, 2, dtype=torch.float64, generator=generator), dim=-1)
    moved = TokenMeasure(points.repeat(2, 1) + 0.01 * moves, children / children.sum())
    transport = wasserstein(TokenMeasure(points, mass), moved, order=math.inf)
    assert transport.lower.value <= transport.upper.value <= 0.01 * (1 + 1e-12)


def test_both_sides_of_the_largest_distance_of_a_mass_below_rounding() -> None:
    start, end = line(0.0, 1.0, mass=row(1 - 1e-14, 1e-14)), line(0.0, 3.0, mass=row(1 - 1e-14, 1e-14))
    transport = wasserstein(start, end, order=math.inf)
    assert (transport.lower.value, transport.upper.value) == (0.0, 2.0)


def test_masses_are_divided_by_their_sum() -> None:
    assert float(line(0.0, 1.0, mass=row(0.5, 0.5 - 5e-10)).mass.sum()) == pytest.approx(1.0, abs=1e-15)
    kept = row(0.1, 0.2, 0.7)
    assert torch.equal(line(0.0, 1.0, 2.0, mass=kept).mass, kept)
