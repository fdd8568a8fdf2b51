"""Conic margin certificate: facts hold at true points, the bound for any multipliers, and no attack is inside."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attnrobust.attacks import attack
from attnrobust.certify.conic import method as conic
from attnrobust.certify.conic.basis import Bases
from attnrobust.certify.conic.margin_program import drop_gradient
from attnrobust.certify.conic.method import ConicMargin
from attnrobust.certify.conic.program import repaired_bound
from attnrobust.certify.conic.solver import solve
from attnrobust.certify.radius import LARGEST
from attnrobust.certify.registry import method_named
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics import exponential, suprema
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most
from tests.cases import case_named
from tests.conic_points import THREATS, assembled, margin_problem, rows_for, true_point, violations

Array = NDArray[np.float64]
METHOD = ConicMargin()


def psi(u: Array) -> Array:
    return np.asarray(exponential.psi(torch.from_numpy(u)).numpy())


def suprema_at(log_weight: Array, limit: Array) -> tuple[Array, Array]:
    """f and k of lemma 3."""
    both = torch.from_numpy(log_weight), torch.from_numpy(limit)
    return suprema.saturating_weight(*both).numpy(), suprema.pair_slope(*both).numpy()


KINDS: tuple[Bases, ...] = ("plain", "aligned", "full")

HARD = (
    "plain-h1-n5-d4", "plain-h2-n3-d4", "single-token-biases", "key-wider-than-value", "narrow-width-1", "biases",
    "scale-negative", "saturated", "saturated-concatenated-masses", "equal-tokens", "near-tie", "large-norms",
    "key-offset-only-w_q-zero", "uniform-w_q-zero-masses", "low-rank", "causal-masses", "padding-causal",
    "finite-mask-masses", "self-only", "masses-one-dominates",
)  # fmt: skip


def moves_inside(problem: Problem, radius: float, *, seed: int) -> torch.Tensor:
    """Moves of the set: random ones of all shapes, some on a single token, some against the margin."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, *problem.clean.points.shape, generator=draw, dtype=torch.float64)
    noise[2:4] *= (3 * torch.randn(2, problem.clean.n, 1, generator=draw, dtype=torch.float64)).exp()
    noise[4:6] *= torch.rand(2, 1, problem.clean.width, generator=draw, dtype=torch.float64) ** 4
    moves = problem.moves.project(noise * 1e3 * radius, radius)
    moves[0] *= 0.2
    points = problem.clean.points.clone().requires_grad_()
    change = problem.resolved.changes(problem.network(points, problem.mass))[0]
    (gradient,) = torch.autograd.grad(change, points)
    moves[6], moves[7] = radius * problem.moves.steepest(gradient), -radius * problem.moves.steepest(gradient)
    return moves


# ---- every fact at true points -------------------------------------------------------------------------------------


QUICK = {"biases", "saturated", "equal-tokens", "low-rank", "self-only", "finite-mask-masses", "plain-h2-n3-d4"}


@pytest.mark.parametrize(
    ("name", "radius"),
    [
        pytest.param(name, radius, marks=() if name in QUICK and radius < 0.1 else pytest.mark.slow)
        for name in HARD
        for radius in (0.02, 0.5, 30.0)
    ],
)
def test_every_fact_holds_at_the_true_point_of_every_move(name: str, radius: float) -> None:
    case = case_named(name)
    index = HARD.index(name)
    for factor, threat in ((1.0, THREATS[index % 5]), (10.0, THREATS[(index + 2) % 5])):
        reached = factor * radius
        problem = margin_problem(case, threat, row=case.n - 1 if index % 2 else None)
        assembly, reach = assembled(problem, reached, bases=KINDS[index % 3])
        for move in moves_inside(problem, reached, seed=index):
            moving = move[threat.movable(case.n)].numpy()
            point = true_point(assembly, moving, reach.token)
            for fact, outside in violations(assembly.program, point).items():
                assert outside <= 1e-9, f"{fact} fails by {outside:.3g} on {name}, {threat.key}, radius {reached}"
            objective = assembly.program.cost @ point + assembly.program.offset
            change = problem.resolved.changes(problem.network(problem.clean.points + move, problem.mass))[0]
            drop = float(change / problem.resolved.budgets[0])
            assert -objective == pytest.approx(drop, rel=1e-9, abs=1e-9)


def test_the_reference_point_sees_a_fact_that_fails() -> None:
    # The check above must be able to fail: a logit range that is too small by a third is noticed.
    case = case_named("plain-h1-n5-d4")
    problem = margin_problem(case, FrobeniusBall())
    assembly, reach = assembled(problem, 1.0)
    rows = list(assembly.program.rows)
    number = next(i for i, group in enumerate(rows) if group.name == "range of u")
    rows[number] = replace(rows[number], const=rows[number].const / 10)
    broken = replace(assembly, program=replace(assembly.program, rows=tuple(rows)))
    worst = max(
        violations(broken.program, true_point(broken, move.numpy(), reach.token))["range of u"]
        for move in moves_inside(problem, 1.0, seed=0)
    )
    assert worst > 0.01


def test_first_order_is_the_gradient_of_the_drop() -> None:
    for name in ("biases", "causal-masses", "finite-mask-masses", "padding-causal"):
        problem = margin_problem(case_named(name), FrobeniusBall())
        points = problem.clean.points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.resolved.changes(problem.network(points, problem.mass))[0], points)
        np.testing.assert_allclose(drop_gradient(rows_for(problem, FrobeniusBall())), gradient.numpy(), atol=1e-12)


# ---- scalar envelopes ----------------------------------------------------------------------------------------------


def test_third_order_term_is_below_its_two_slopes() -> None:
    """``-t w (1 - p)(psi(u) - s u) <= max(k- u t, -k+ u t)`` for every s between w psi(u) and its bound."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        log_weight, limit = -float(draw.exponential(3.0)), float(draw.uniform(0.05, 8.0))
        weight, share = math.exp(log_weight), float(draw.uniform(0.02, 0.999))
        _, opposite = suprema_at(np.array([log_weight]), np.array([limit]))
        same = weight * (share + (1 - share) * float(psi(np.array([-limit]))[0]) / limit)
        u = np.linspace(-limit, limit, 201)[:, None]
        s = weight * psi(u) + np.linspace(0.0, 1.0, 101) ** 3 * (share / (1 - share))
        p = s / (1 + s)
        inside = p <= share
        for t in (-1.0, 1.0):
            term = -t * weight * (1 - p) * (psi(u) - s * u)
            bound = np.maximum(same * u * t, -float(opposite[0]) * u * t)
            assert (term <= bound + 1e-12)[inside].all()


def test_remainder_weight_is_between_its_two_quadratics() -> None:
    """``c u^2/2 <= w psi(u) / (1 + s) <= f u^2/2``, and p <= sum f u^2/2, at every weight vector and change."""
    draw = np.random.default_rng(1)
    for _ in range(300):
        logs = draw.normal(size=5) * 3.0
        weight = np.exp(logs - np.logaddexp.reduce(logs))
        a = draw.normal(size=5) * draw.uniform(0.1, 4.0)
        u = a - weight @ a
        limit = np.abs(u) * draw.uniform(1.0, 2.0, size=5) + 1e-9
        s = float(weight @ psi(u))
        above, _ = suprema_at(np.log(weight), limit)
        mass = weight * psi(u) / (1 + s)
        assert (mass <= above * u**2 / 2 + 1e-14).all()
        assert s / (1 + s) <= above @ u**2 / 2 + 1e-14
        low = weight * exponential.phi_negative(torch.from_numpy(limit)).numpy() / (1 + 1.5 * s)
        assert (mass >= low * u**2 / 2 - 1e-14).all()


# ---- the repaired bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["plain-h1-n2-d2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain-h2-n3-d4", "causal-masses"))],
)
def test_any_multipliers_prove_a_true_bound(name: str) -> None:
    problem = margin_problem(case_named(name), FrobeniusBall())
    assembly, reach = assembled(problem, 0.5)
    program, draw = assembly.program, np.random.default_rng(3)
    points = [true_point(assembly, m.numpy(), reach.token) for m in moves_inside(problem, 0.5, seed=1)]
    lowest = min(float(program.cost @ x) + program.offset for x in points)
    for size in (0.0, 1e-6, 1e-3, 1.0, 1e3):
        for _ in range(4):
            guess = [size * draw.normal(size=len(rows.const)) for rows in program.rows]
            assert repaired_bound(program, guess) <= lowest
    found = solve(program)
    assert found is not None
    best = repaired_bound(program, found.values)
    assert best <= lowest
    primal = float(program.cost @ found.point) + program.offset
    assert best == pytest.approx(primal, abs=1e-4)  # and the solver's multipliers are worth having
    for size in (1e-6, 1e-2, 10.0):
        spoilt = [y + size * draw.normal(size=len(y)) for y in found.values]
        assert repaired_bound(program, spoilt) <= lowest
    assert repaired_bound(program, [y * math.nan for y in found.values]) == -math.inf


# ---- the certificate -----------------------------------------------------------------------------------------------

SMALL = ("plain-h1-n2-d2", "plain-h2-n3-d4", "saturated-concatenated-masses", "causal-masses", "self-only", "near-tie")


@pytest.mark.parametrize("name", [SMALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL[1:])])
def test_no_attack_inside_the_certified_radius(name: str) -> None:
    case = case_named(name)
    threat = THREATS[SMALL.index(name) % len(THREATS)]
    problem = margin_problem(case, threat, row=0)
    certificate = METHOD.certify(problem)
    found = attack(problem, seed=1)
    assert certificate.kind is Kind.FLOAT64
    assert certificate.radius > 0.0
    assert_at_most(certificate.radius, min(found.radius, LARGEST))


def random_problem(seed: int) -> Problem:
    """A small layer of any kind: heads, biases, output projection, masks, masses, scales; any threat and pooling."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=draw))]

    n, d, heads, k, v = one_of(2, 3, 4), one_of(1, 2, 3), one_of(1, 1, 2), one_of(1, 2), one_of(1, 2, 3)
    biased, projected, masked, weighted = (bool(one_of(0, 1)) for _ in range(4))
    mask = normal(n, n).masked_fill(normal(n, n) > 1.2, -torch.inf).fill_diagonal_(0.0) if masked else None
    strength = 0.3 * 2.0 ** one_of(0, 1, 2, 3)
    layer = Attention(
        w_q=strength * normal(heads, d, k), w_k=normal(heads, d, k), w_v=normal(heads, d, v),
        b_q=normal(heads, k) if biased else None, b_v=normal(heads, v) if biased else None,
        w_o=normal(heads, v, 2) if projected else None, mask=mask, causal=mask is None and bool(one_of(0, 1)),
    )  # fmt: skip
    mass = torch.softmax(2 * normal(n), 0) if weighted else torch.full((n,), 1 / n, dtype=torch.float64)
    goal = Margin(weight=normal(one_of(2, 3), layer.out_width), pool="mean" if one_of(0, 1) else one_of(0, n - 1))
    threat = (*THREATS[:4], PerTokenBall(norm="l1"), AnyToken())[seed % 6]
    return Problem(layer, TokenMeasure(one_of(1, 1, 3) * normal(n, d), mass), threat, goal)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 150))])
def test_nothing_inside_a_ball_uses_more_than_the_bound_at_its_radius(seed: int) -> None:
    # Sharper than a search for violations: at every radius the bound is compared with the largest use of the budget.
    problem = random_problem(seed)
    bound = METHOD.prepare(problem, seed=0)
    radius = (0.3, 0.8, 1.5, 4.0)[seed % 4] * (bound.first_guess or 1.0)
    used = bound.usage(radius).value
    found = attack(problem, epsilon=radius, seed=seed)  # gradient ascent from many starts
    assert_at_most(found.usage, used)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(2000, *problem.clean.points.shape, generator=draw, dtype=torch.float64)
    noise[1000:] *= (3 * torch.randn(1000, problem.clean.n, 1, generator=draw, dtype=torch.float64)).exp()
    moves = problem.moves.project(noise * 1e3 * radius, radius)
    moves[::3] *= torch.rand(len(moves[::3]), 1, 1, generator=draw, dtype=torch.float64)
    # the projection of points a thousand radii away ends 1e-11 outside
    moves *= (radius / problem.moves.distance(moves)).clamp(max=1.0)[:, None, None]
    assert_at_most(float(problem.usage(moves).max()), used)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_no_violation_is_found_inside_a_certified_ball(seed: int) -> None:
    problem = random_problem(1000 + seed)
    radius = METHOD.certify(problem).radius
    assert_at_most(radius, min(attack(problem, seed=seed).radius, LARGEST))
    inside = attack(problem, epsilon=radius, seed=seed + 1).usage if 0.0 < radius < LARGEST else 0.0
    assert_at_most(inside, 1.0 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_no_attack_inside_over_all_threats_and_classes(name: str) -> None:
    case = case_named(name)
    for index, threat in enumerate((*THREATS, AnyToken())):
        problem = margin_problem(case, threat, classes=3, row=None if index % 2 else 0)
        if METHOD.refuses(problem) is None:
            assert_at_most(METHOD.certify(problem).radius, min(attack(problem, seed=2).radius, LARGEST))


def linear_layer(values: torch.Tensor) -> Attention:
    """Uniform attention: W_q = 0."""
    d = values.shape[0]
    return Attention(w_q=torch.zeros(1, d, 2), w_k=torch.ones(1, d, 2), w_v=values[None])


@pytest.mark.parametrize(
    "threat", [FrobeniusBall(), PerTokenBall(), PerTokenBall(norm="linf"), PerTokenBall(norm="l1")]
)
def test_a_linear_layer_is_exact_under_every_threat(threat: MoveThreat) -> None:
    layer = linear_layer(torch.diag(torch.tensor([1.0, 2.0, -3.0])))
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 0.0]])
    goal = Margin(weight=weight, bias=torch.tensor([5.0, 0.0]))
    problem = Problem(layer, TokenMeasure(torch.arange(12.0).reshape(4, 3) / 10), threat, goal)
    gradient = (torch.tensor([1.0, 1.0, -3.0], dtype=torch.float64) / 4).expand(4, 3)
    exact = float(problem.resolved.budgets[0] / threat.dual_norm(gradient))
    radius = METHOD.certify(problem).radius
    assert_at_most(radius, exact)
    assert radius == pytest.approx(exact, rel=6e-3)


def test_small_radii_cost_little_more_than_the_first_order() -> None:
    """At most a little more than linear, and never below what an attack uses (negative curvature: below linear)."""
    problem = margin_problem(case_named("plain-h1-n2-d2"), FrobeniusBall())
    bound = METHOD.prepare(problem, seed=0)
    gradient = torch.from_numpy(drop_gradient(rows_for(problem, FrobeniusBall())))
    for radius in (1e-3, 1e-2):
        linear = radius * float(np.linalg.norm(gradient)) / float(problem.resolved.budgets[0])
        used, reached = bound.usage(radius).value, attack(problem, epsilon=radius).usage
        assert_at_most(linear * (1 - 60 * radius), reached, what="the attack is near its first order")
        assert_at_most(reached, used, rtol=1e-10, what="no point inside uses more than the bound")
        assert_at_most(used, linear * (1 + 60 * radius))


def test_any_token_is_the_worst_of_its_tokens() -> None:
    case = case_named("plain-h2-n3-d4")
    together = METHOD.prepare(margin_problem(case, AnyToken(), row=1), seed=0).usage(0.4).value
    single = [
        METHOD.prepare(margin_problem(case, FrobeniusBall(tokens=(i,)), row=1), seed=0).usage(0.4).value
        for i in range(3)
    ]
    assert together == pytest.approx(max(single), rel=1e-6)


def test_a_solver_that_gives_up_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conic, "solve", lambda _: None)
    problem = margin_problem(case_named("plain-h1-n2-d2"), FrobeniusBall())
    assert METHOD.prepare(problem, seed=0).usage(0.1).value == math.inf
    assert METHOD.certify(problem).radius == 0.0


@pytest.mark.slow
def test_multipliers_of_another_radius_are_worse_but_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = margin_problem(case_named("plain-h2-n3-d4"), FrobeniusBall())
    honest = METHOD.certify(problem).radius
    kept = solve(assembled(problem, honest / 3)[0].program)
    monkeypatch.setattr(conic, "solve", lambda _: kept)
    assert 0.0 < METHOD.certify(problem).radius <= honest * (1 + 1e-3)


def test_what_it_does_not_speak_about_is_refused_by_name() -> None:
    case = case_named("plain-h2-n3-d4")
    displacement = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
    assert "it speaks about the goals Margin" in str(METHOD.refuses(displacement))
    assert METHOD.refuses(margin_problem(case, FrobeniusBall())) is None
    assert method_named("conic-margin").name == METHOD.name


@pytest.mark.slow
def test_one_head_of_width_16_is_within_twice_the_attack() -> None:
    draw = torch.Generator().manual_seed(0)
    random = [torch.randn(1, 16, 16, generator=draw, dtype=torch.float64) / 4 for _ in range(3)]
    layer = Attention(w_q=random[0], w_k=random[1], w_v=random[2])
    points = torch.randn(4, 16, generator=draw, dtype=torch.float64)
    centres = torch.stack([layer(x).mean(0) for x in (points, torch.randn(4, 16, generator=draw, dtype=torch.float64))])
    goal = Margin(weight=centres, bias=-0.5 * (centres**2).sum(1))
    problem = Problem(layer, TokenMeasure(points), FrobeniusBall(), goal)
    radius, attacked = METHOD.certify(problem).radius, attack(problem, seed=0).radius
    assert_at_most(radius, attacked)
    assert attacked / radius < 1.35
