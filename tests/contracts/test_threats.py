"""What every threat model owes, over all of them; a threat that is missing from the table below fails."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.transport import Order
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_in_set, assert_same_bits

N, D = 5, 3
ORDERS: tuple[Order, ...] = (1, 2, math.inf)
THREATS: tuple[MoveThreat, ...] = (
    FrobeniusBall(),
    FrobeniusBall(tokens=(2,)),
    FrobeniusBall(tokens=(0, 3, 4)),
    PerTokenBall(),
    PerTokenBall(tokens=(1, 2)),
    PerTokenBall(norm="linf"),
    PerTokenBall(norm="linf", tokens=(0, 4)),
    PerTokenBall(norm="l1"),
    PerTokenBall(norm="l1", tokens=(3,)),
    AnyToken(),
    AnyToken(tokens=(1, 4)),
)
OTHERS: tuple[Threat, ...] = (
    *(kind(order) for kind in (CouplingBall, WassersteinBall) for order in ORDERS),
    CouplingBall(1, domain_radius=3.5),
    WassersteinBall(2, domain_radius=1e-3 / 3 + 10.0),
    CouplingBall(math.inf, tokens=(2,)),
    WassersteinBall(2, domain_radius=3.5, tokens=(0, 3)),
    Copies(1),
    Copies(2),
    Copies(2, "strict"),
    Copies(1, moves=PerTokenBall()),
    Copies(1, "strict", PerTokenBall(norm="linf", tokens=(0, 4))),
    Copies(3, moves=FrobeniusBall(tokens=(1,))),
    Copies(3, moves=FrobeniusBall(tokens=(1, 2))),
)
CONVEX = tuple(threat for threat in THREATS if not isinstance(threat, AnyToken))


def every_threat_class(base: type[Threat] = Threat) -> Iterator[type[Threat]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from every_threat_class(subclass)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inside(threat: MoveThreat, epsilon: float, count: int, *, seed: int = 0) -> Tensor:
    """Members of the set, made without ``project``: movable tokens, rescaled; every other one on the boundary."""
    delta = draw(count, N, D, seed=seed) * threat.movable(N)[:, None]
    # directions of every sparsity, so that the corners of linf and l1 balls are among them
    delta = delta * (torch.rand(count, N, D, generator=torch.Generator().manual_seed(seed)) < 0.6)
    if isinstance(threat, AnyToken):
        chosen = threat.movable(N).nonzero().flatten()
        one = torch.nn.functional.one_hot(chosen[torch.arange(count) % len(chosen)], N)
        delta = delta * one[..., None]
    size = threat.distance(delta)
    assert bool(torch.isfinite(size).all())
    share = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    share[::2] = 1.0
    factor = torch.where(size > 0, epsilon * share / size.clamp_min(1e-30), 0.0)
    return delta * factor[:, None, None] * (1 - 1e-12)


@pytest.fixture(params=THREATS, ids=lambda threat: threat.key)
def threat(request: pytest.FixtureRequest) -> MoveThreat:
    chosen = request.param
    assert isinstance(chosen, MoveThreat)
    return chosen


def test_every_class_is_in_the_table() -> None:
    missing = {c.__name__ for c in every_threat_class() if not c.__module__.startswith("tests")}
    missing -= {type(threat).__name__ for threat in (*THREATS, *OTHERS)} | {"MoveThreat", "MeasureThreat"}
    assert not missing, f"add to THREATS: {sorted(missing)}"


@pytest.mark.parametrize("threat", [*THREATS, *OTHERS], ids=lambda threat: threat.key)
def test_keys_are_unique_and_read_back(threat: Threat) -> None:
    assert [t.key for t in (*THREATS, *OTHERS)].count(threat.key) == 1
    again = parse_threat(threat.key)
    assert again == threat
    assert again.key == threat.key
    assert hash(again) == hash(threat)


def test_digests_are_unique_and_those_of_moves_are_the_keys() -> None:
    digests = [threat.digest(lambda key: f"moves {key}") for threat in (*THREATS, *OTHERS)]
    assert len(set(digests)) == len(digests)
    assert digests[: len(THREATS)] == [f"moves {threat.key}" for threat in THREATS]


@pytest.mark.parametrize("threat", [*THREATS, *OTHERS], ids=lambda threat: threat.key)
def test_tokens_that_do_not_exist_are_refused_by_every_threat(threat: Threat) -> None:
    tokens = getattr(getattr(threat, "moves", threat), "tokens", None)
    clean = TokenMeasure(0.1 * draw(N, D))
    threat.check(clean)
    movable = threat.movable(N).nonzero().flatten().tolist()
    assert movable == (list(range(N)) if tokens is None else list(tokens))
    if tokens is not None:
        with pytest.raises(InputError, match=f"token {max(tokens)} does not exist"):
            threat.check(TokenMeasure(draw(max(tokens), D)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("frobenus", "frobenius"), ("coupling:3", "coupling:2"), ("waserstein:2", "wasserstein:2"),
        ("copies:2:per-tokn", "per-token"), ("copies:1:loose", "unknown order or moves"), ("copies", "copies:2"),
        ("copies:x", "copies:2"), ("copies:0", ">= 1"), ("copies:1:any-token", "per-token"),
        ("wasserstein:2:within:-1", "within:3.5"), ("wasserstein:2:within:nan", "within:3.5"),
        ("coupling:2:tokens:", "token indices"), ("coupling:2:tokens:1,1x", "token indices"),
        ("coupling:2:tokens:1:within:3", "coupling:2"), ("token:1,2", "token indices"), ("tokens", "token indices"),
        ("per-token:", "token indices"),
    ],
)  # fmt: skip
def test_misspelt_keys_say_what_was_meant(text: str, word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_threat(text)
    assert word in str(caught.value)


def test_distance_to_itself_is_zero(threat: MoveThreat) -> None:
    assert float(threat.distance(torch.zeros(N, D, dtype=torch.float64))) == 0.0


def test_distance_is_positively_homogeneous(threat: MoveThreat) -> None:
    delta = inside(threat, 1.0, 20)
    assert_close(threat.distance(3.5 * delta), 3.5 * threat.distance(delta), rtol=1e-14)
    assert_close(threat.distance(-delta), threat.distance(delta), rtol=0)


def test_moving_a_token_outside_the_subset_is_infinite(threat: MoveThreat) -> None:
    for token in (~threat.movable(N)).nonzero().flatten().tolist():
        delta = torch.zeros(N, D, dtype=torch.float64)
        delta[token, 1] = 1e-200
        assert float(threat.distance(delta)) == torch.inf
        assert_same_bits(threat.project(delta, 1.0), torch.zeros_like(delta))


def test_points_inside_are_unchanged(threat: MoveThreat) -> None:
    delta = inside(threat, 0.7, 60)
    assert_same_bits(threat.project(delta, 0.7), delta, what="projection of members")


def test_zero_budget_is_the_clean_input(threat: MoveThreat) -> None:
    assert_same_bits(threat.project(draw(4, N, D), 0.0).abs(), torch.zeros(4, N, D, dtype=torch.float64))


def test_points_outside_land_on_the_boundary(threat: MoveThreat) -> None:
    delta = 10 * draw(40, N, D)
    projected = threat.project(delta, 0.7)
    # two roundings (quotient, product) a component and those of the norm: a few units in the last place
    assert_close(threat.distance(projected), torch.full((40,), 0.7, dtype=torch.float64), rtol=1e-14)


def test_projection_is_idempotent(threat: MoveThreat) -> None:
    once = threat.project(3 * draw(40, N, D), 0.7)
    assert_close(threat.project(once, 0.7), once, rtol=1e-14)


def test_projection_is_nearest_among_members(threat: MoveThreat) -> None:
    outside = 2 * draw(25, N, D, seed=3)
    projected = threat.project(outside, 0.7)
    assert_in_set(threat, projected, 0.7)
    reached = torch.linalg.vector_norm(outside - projected, dim=(-2, -1))
    members = torch.cat([inside(threat, 0.7, 400, seed=5), *near(threat, projected, 0.7)])
    apart = torch.linalg.vector_norm(outside[:, None] - members[None], dim=(-2, -1)).amin(dim=1)
    # 1e-12: the members beside the projection itself are as near to rounding
    assert bool((reached <= apart * (1 + 1e-12)).all()), f"{threat.key}: a member is nearer than the projection"


def near(threat: MoveThreat, projected: Tensor, epsilon: float) -> Iterator[Tensor]:
    """Members around a projection, made without ``project``: small moves, scaled back where they left the set."""
    for size in (1e-1, 1e-2, 1e-3):
        moved = projected + size * draw(*projected.shape, seed=7) * (projected != 0).any(dim=-1)[..., None]
        excess = (threat.distance(moved) / epsilon).clamp_min(1.0)
        yield moved / excess[:, None, None] * (1 - 1e-13)


@pytest.mark.parametrize("threat", CONVEX, ids=lambda threat: threat.key)
def test_convex_projection_makes_an_obtuse_angle(threat: MoveThreat) -> None:
    """A projection onto a convex set C is p with <x - p, y - p> <= 0 for every y of C, and nothing else."""
    outside = 2 * draw(25, N, D, seed=3)
    projected = threat.project(outside, 0.7)
    away = outside - projected
    # the largest <away, y> over the set is dual_norm * epsilon; it is attained at the projection
    best = 0.7 * threat.dual_norm(away)
    assert_close((away * projected).sum(dim=(-2, -1)), best, rtol=1e-12, what="support function at the projection")


def test_budgets_of_a_batch_are_its_own(threat: MoveThreat) -> None:
    delta, budgets = 5 * draw(4, N, D), torch.tensor([0.1, 0.5, 2.0, 1e3], dtype=torch.float64)
    together = threat.project(delta, budgets)
    for one, epsilon, row in zip(delta, budgets, together, strict=True):
        assert_same_bits(row, threat.project(one, float(epsilon)), what="row of a batch")


def test_leading_dimensions_are_a_batch(threat: MoveThreat) -> None:
    delta = draw(2, 3, N, D)
    for function in (threat.distance, threat.dual_norm, threat.steepest, lambda x: threat.project(x, 0.4)):
        whole = function(delta)
        assert whole.shape[:2] == (2, 3)
        assert_same_bits(whole[1, 2], function(delta[1, 2]))


def test_dual_norm_bounds_every_member(threat: MoveThreat) -> None:
    members = inside(threat, 1.0, 400)
    for gradient in draw(10, N, D, seed=9):
        dual = float(threat.dual_norm(gradient))
        largest = float((gradient * members).sum(dim=(-2, -1)).max())
        assert_at_most(largest, dual, rtol=1e-14, what=f"{threat.key}: <g, D>")


def test_steepest_attains_the_dual_norm(threat: MoveThreat) -> None:
    gradient = draw(30, N, D, seed=9)
    step = threat.steepest(gradient)
    assert_in_set(threat, step, 1.0)
    assert_close((gradient * step).sum(dim=(-2, -1)), threat.dual_norm(gradient), rtol=1e-13, what="<g, steepest>")


def test_no_gradient_gives_no_step(threat: MoveThreat) -> None:
    zero = torch.zeros(N, D, dtype=torch.float64)
    assert_same_bits(threat.steepest(zero), zero)
    assert float(threat.dual_norm(zero)) == 0.0


def test_dual_norm_needs_the_movable_tokens_only(threat: MoveThreat) -> None:
    gradient = draw(N, D)
    other = gradient + 100 * (~threat.movable(N))[:, None]
    assert_same_bits(threat.dual_norm(other), threat.dual_norm(gradient))
    assert_same_bits(threat.steepest(other), threat.steepest(gradient))


def test_factors_hold_and_are_attained(threat: MoveThreat) -> None:
    corner = torch.ones(N, D, dtype=torch.float64) * threat.movable(N)[:, None]
    if isinstance(threat, PerTokenBall) and threat.norm == "l1":
        corner = corner * torch.eye(D, dtype=torch.float64)[0]
    if isinstance(threat, AnyToken):
        corner = corner * torch.nn.functional.one_hot(threat.movable(N).nonzero()[0, 0], N)[:, None]
    one = corner * threat.movable(N).nonzero().flatten()[:1].eq(torch.arange(N))[:, None]
    members = torch.cat([inside(threat, 1.0, 400), (corner / threat.distance(corner))[None]])
    members = torch.cat([members, (one / threat.distance(one))[None]])
    distance = threat.distance(members)
    kept = distance > 0
    frobenius = torch.linalg.vector_norm(members, dim=(-2, -1))[kept] / distance[kept]
    token = torch.linalg.vector_norm(members, dim=-1).amax(dim=-1)[kept] / distance[kept]
    assert_close(frobenius.max(), frobenius.new_tensor(threat.frobenius_factor(N, D)), rtol=1e-13, what="frobenius")
    assert_close(token.max(), token.new_tensor(threat.token_factor(N, D)), rtol=1e-13, what="token")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(threat: MoveThreat, bad: float) -> None:
    """A broken point must not be projected to a harmless one: its distance is NaN or infinite, before and after."""
    delta = draw(N, D)
    delta[int(threat.movable(N).nonzero()[0, 0]), 0] = bad
    before = float(threat.distance(delta))
    assert not before < torch.inf
    projected = threat.project(delta, 1.0)
    finite_projection_of_infinity = bad == torch.inf and bool(torch.isfinite(projected).all())
    assert finite_projection_of_infinity or not float(threat.distance(projected)) < torch.inf


def test_gradients_flow_through_the_dual_norm(threat: MoveThreat) -> None:
    """Attacks and certificates may differentiate it; the gradient is a maximiser (Danskin)."""
    gradient = draw(N, D, seed=9).requires_grad_()
    (slope,) = torch.autograd.grad(threat.dual_norm(gradient), gradient)
    assert_close(slope, threat.steepest(gradient.detach()), rtol=1e-13)
