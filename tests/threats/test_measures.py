"""Measure threats: distance, projection, bad masses."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.numerics.transport import Order, wasserstein
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import PerturbedTokens, TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits, shapes_unchecked

ORDERS: tuple[Order, ...] = (1, 2, math.inf)
THREATS = tuple(kind(order) for kind in (CouplingBall, WassersteinBall) for order in ORDERS)
CLEAN = TokenMeasure(
    torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_rest(clean: TokenMeasure) -> PerturbedTokens:
    """The clean input as a perturbation of itself."""
    return PerturbedTokens(clean.points, clean.mass, torch.arange(clean.n))


def split(seed: int, *, size: float = 1.0) -> PerturbedTokens:
    """Every token in two unequal atoms, each moved."""
    share = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8 + 0.1
    mass = torch.cat([CLEAN.mass * share, CLEAN.mass * (1 - share)])
    points = CLEAN.points.repeat(2, 1) + size * draw(8, 3, seed=seed + 10)
    return PerturbedTokens(points, mass, torch.arange(4).repeat(2))


@pytest.fixture(params=THREATS, ids=lambda threat: threat.key)
def threat(request: pytest.FixtureRequest) -> MeasureThreat:
    chosen = request.param
    assert isinstance(chosen, MeasureThreat)
    return chosen


def test_keys_read_back(threat: MeasureThreat) -> None:
    assert parse_threat(threat.key) == threat
    assert [t.key for t in THREATS].count(threat.key) == 1
    with pytest.raises(UnknownNameError, match="wasserstein:2"):
        parse_threat("waserstein:2")


def test_distance_to_itself_is_zero(threat: MeasureThreat) -> None:
    assert threat.distance(CLEAN, at_rest(CLEAN)) <= 1e-12


def test_the_coupling_is_never_cheaper_than_transport() -> None:
    for seed in range(10):
        for order in (1, 2, math.inf):
            perturbed = split(seed)
            assert_at_most(
                wasserstein(CLEAN, perturbed.measure, order=order).lower.value,
                CouplingBall(order).distance(CLEAN, perturbed),
                rtol=1e-12,
            )


def test_points_inside_are_unchanged(threat: MeasureThreat) -> None:
    perturbed = split(3, size=0.01)
    assert threat.project(CLEAN, perturbed, 1.0) is perturbed


@pytest.mark.parametrize("seed", range(4))
def test_points_outside_land_on_the_boundary(threat: MeasureThreat, seed: int) -> None:
    projected = threat.project(CLEAN, split(seed, size=3.0), 0.3)
    assert_at_most(threat.distance(CLEAN, projected), 0.3, rtol=1e-9)
    assert_at_most(0.3, threat.distance(CLEAN, projected), rtol=1e-9)
    assert projected.keeps_masses(CLEAN)


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_wasserstein_projection_is_nearest(order: float) -> None:
    """Nothing in the ball is nearer than distance - epsilon (triangle inequality); the projection is that near."""
    outside = split(5, size=2.0)
    ball = WassersteinBall(order)
    distance = ball.distance(CLEAN, outside)
    projected = ball.project(CLEAN, outside, 0.4)
    apart = wasserstein(projected.measure, outside.measure, order=order).upper.value
    assert apart == pytest.approx(distance - 0.4, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_coupling_projection_is_nearest_among_the_same_masses(order: float) -> None:
    outside = split(6, size=2.0)
    ball = CouplingBall(order)
    projected = ball.project(CLEAN, outside, 0.5)

    def apart(points: Tensor) -> float:
        return float((outside.mass * ((points - outside.points) ** 2).sum(dim=1)).sum().sqrt())

    best = apart(projected.points)
    for seed in range(300):
        other = CLEAN.points[outside.parent] + projected.displacement(CLEAN) + 0.1 * draw(8, 3, seed=seed)
        move = other - CLEAN.points[outside.parent]
        size = ball.distance(CLEAN, PerturbedTokens(other, outside.mass, outside.parent))
        other = CLEAN.points[outside.parent] + move * min(1.0, 0.5 / size)
        assert_at_most(best, apart(other), rtol=1e-12)


def test_mass_that_changes_hands_is_infinitely_far_by_coupling_only() -> None:
    mass = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    traded = PerturbedTokens(CLEAN.points, mass, torch.arange(4))
    assert not traded.keeps_masses(CLEAN)
    assert CouplingBall(2).distance(CLEAN, traded) == math.inf
    assert 0 < WassersteinBall(2).distance(CLEAN, traded) < math.inf
    with pytest.raises(InputError, match="carry exactly its mass"):
        CouplingBall(2).project(CLEAN, traded, 0.1)


def test_bad_masses_and_parents_are_named() -> None:
    parent = torch.arange(4)
    with pytest.raises(InputError, match="must be > 0"):
        PerturbedTokens(CLEAN.points, torch.tensor([0.5, 0.6, -0.1, 0.0]).double(), parent)
    with pytest.raises(InputError, match="sum to 1"):
        PerturbedTokens(CLEAN.points, CLEAN.mass * 2, parent)
    with shapes_unchecked(), pytest.raises(InputError, match="one token index per atom"):
        PerturbedTokens(CLEAN.points, CLEAN.mass, parent[:3])
    with pytest.raises(InputError, match="negative"):
        PerturbedTokens(CLEAN.points, CLEAN.mass, parent - 1)
    with pytest.raises(InputError, match="cover exactly the 4"):
        PerturbedTokens(CLEAN.points, CLEAN.mass, torch.tensor([0, 1, 2, 2])).displacement(CLEAN)
    with pytest.raises(InputError, match="order 3"):
        CouplingBall(3.0)


def test_splitting_in_place_changes_nothing() -> None:
    half = PerturbedTokens(CLEAN.points.repeat(2, 1), CLEAN.mass.repeat(2) / 2, torch.arange(4).repeat(2))
    for threat in THREATS:
        assert threat.distance(CLEAN, half) <= 1e-7
        assert_same_bits(threat.project(CLEAN, half, 0.1).points, half.points)
    assert_close(half.displacement(CLEAN), torch.zeros(8, 3).double(), rtol=0)


# ---- domains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CouplingBall, WassersteinBall])
@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_atoms_outside_of_the_domain_are_no_members(kind: type[MeasureThreat], order: float) -> None:
    reach = float(torch.linalg.vector_norm(CLEAN.points, dim=1).max())
    threat, free = kind(order, domain_radius=reach), kind(order)
    outside = split(2, size=4.0)
    assert threat.distance(CLEAN, outside) == math.inf
    assert free.distance(CLEAN, outside) < math.inf
    projected = threat.project(CLEAN, outside, 0.3)
    assert_at_most(threat.distance(CLEAN, projected), 0.3, rtol=1e-9)
    assert_at_most(float(torch.linalg.vector_norm(projected.points, dim=1).max()), reach, rtol=1e-12)
    inside = split(2, size=0.0)
    assert threat.distance(CLEAN, inside) <= 1e-12


def test_domains_are_part_of_the_key() -> None:
    threat = WassersteinBall(2, domain_radius=3.5)
    assert threat.key == "wasserstein:2:within:3.5"
    assert parse_threat(threat.key) == threat != WassersteinBall(2)
    assert hash(threat) == hash(WassersteinBall(2, domain_radius=3.5))
    for text in ("coupling:inf:within:x", "coupling:inf:within:-1", "coupling:inf:within:nan"):
        with pytest.raises(InputError, match=r"coupling:2:within:3.5"):
            parse_threat(text)
    with pytest.raises(UnknownNameError, match="coupling:2"):
        parse_threat("couplin:2:within:3")


# ---- tokens that may move --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CouplingBall, WassersteinBall])
@pytest.mark.parametrize("order", ORDERS)
def test_mass_of_other_tokens_stays(kind: type[MeasureThreat], order: Order) -> None:
    threat, free = kind(order, tokens=(1, 3)), kind(order)
    moved = split(3)
    assert threat.distance(CLEAN, moved) == math.inf
    projected = threat.project(CLEAN, moved, 0.3)
    assert_at_most(threat.distance(CLEAN, projected), 0.3, rtol=1e-9)
    assert threat.distance(CLEAN, projected) == pytest.approx(0.3, rel=1e-6)
    fixed = ~torch.isin(projected.parent, torch.tensor([1, 3]))
    assert float(projected.displacement(CLEAN)[fixed].abs().max()) == 0.0
    # the whole measure is no farther than its movable part
    assert_at_most(free.distance(CLEAN, projected), threat.distance(CLEAN, projected), rtol=1e-9)
    nudged = PerturbedTokens(projected.points + 1e-200, projected.mass, projected.parent)
    lone = projected.points.clone()
    lone[fixed.nonzero()[0, 0], 0] += 1e-12
    assert threat.distance(CLEAN, PerturbedTokens(lone, projected.mass, projected.parent)) == math.inf
    assert threat.distance(CLEAN, nudged) < math.inf  # 1e-200 is lost in the tokens


def test_mass_that_leaves_a_fixed_token_is_infinitely_far() -> None:
    mass = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    traded = PerturbedTokens(CLEAN.points, mass, torch.arange(4))
    assert WassersteinBall(2, tokens=(1, 2)).distance(CLEAN, traded) == math.inf
    assert 0 < WassersteinBall(2, tokens=(0, 3)).distance(CLEAN, traded) < math.inf


def test_tokens_that_do_not_exist_are_named() -> None:
    with pytest.raises(InputError, match="token 7 does not exist"):
        WassersteinBall(2, tokens=(7,)).check(CLEAN)
    with pytest.raises(InputError, match="is empty"):
        CouplingBall(2, tokens=())


# ---- tiny masses -----------------------------------------------------------------------------------------------------


def test_a_tiny_mass_counts_in_the_largest_distance() -> None:
    """A far atom whose mass is below the rounding of the transport plan: W_inf is its distance, not 0."""
    points = torch.cat([CLEAN.points, CLEAN.points[:1] + 5.0])
    mass = torch.cat([CLEAN.mass, torch.tensor([1e-14]).double()])
    mass[0] -= 1e-14
    far = PerturbedTokens(points, mass, torch.tensor([0, 1, 2, 3, 0]))
    distances = torch.linalg.vector_norm(CLEAN.points - points[-1], dim=1)
    assert WassersteinBall(math.inf).distance(CLEAN, far) == pytest.approx(float(distances.min()), rel=1e-12)
    assert CouplingBall(math.inf).distance(CLEAN, far) == pytest.approx(5.0 * 3**0.5, rel=1e-12)


def test_a_tiny_mass_may_not_grow() -> None:
    """Tolerances of masses are relative: 1e-12 is not kept by 1e-10."""
    clean = TokenMeasure(CLEAN.points[:2], torch.tensor([1.0 - 1e-12, 1e-12]).double())
    grown = PerturbedTokens(clean.points, torch.tensor([1.0 - 1e-10, 1e-10]).double(), torch.arange(2))
    assert not grown.keeps_masses(clean)
    assert at_rest(clean).keeps_masses(clean)
