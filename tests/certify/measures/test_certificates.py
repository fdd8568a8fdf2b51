"""Certificates for token measures: nothing that random, gradient or splitting attacks find is inside; exact cases."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack, duplication_effect
from attnrobust.certify import certify, worst_copies
from attnrobust.certify.measures.cluster import highest_average, largest_weight_change
from attnrobust.certify.measures.curvature import second_derivative
from attnrobust.comparison import UnsoundError, compare, join
from attnrobust.errors import AlreadyViolatedError, InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.goals import Displacement, Goal, Margin, Pool
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import PerturbedTokens, TokenMeasure
from tests.assertions import assert_at_most, assert_close, refused
from tests.cases import case_named
from tests.measure_problems import (
    GOALS,
    KINDS,
    Draw,
    Prepared,
    ascended_atoms,
    random_atoms,
    random_problem,
    threats,
)

QUICK = AttackBudget(restarts=2, steps=8, rounds=1)
FEW = AttackBudget(restarts=1, steps=4, rounds=1)


def problem_or_none(seed: int, kind: str, goal: str) -> Problem | None:
    try:
        return random_problem(seed, kind, goal=goal)
    except AlreadyViolatedError:
        return None


def try_to_break(seed: int, *, measures: int, steps: int) -> int:
    """One random problem of one kind and goal against every threat; how many measures were tried."""
    kind, goal = KINDS[seed % len(KINDS)], GOALS[(seed // len(KINDS)) % len(GOALS)]
    problem, draw, tried = problem_or_none(seed, kind, goal), Draw(10**6 + seed), 0
    if problem is None:
        return 0
    for threat in threats(problem, room=draw.uniform(1.0, 2.0), goal=goal):
        prepared = Prepared.of(problem, threat)
        assert threat.domain_radius is not None
        for index in range(measures if prepared.bounds else 0):
            atoms = random_atoms(draw, problem.clean, threat.domain_radius, 10 ** draw.uniform(-3, 0))
            candidates = [atoms]
            if index == 0 and steps:
                candidates += ascended_atoms(draw, problem, atoms, threat, steps=steps)
            for candidate in candidates:
                prepared.check(candidate)
                tried += 1
    return tried


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_no_measure_beats_a_bound(kind: int) -> None:
    """Every kind with two goals; random masses and positions, and gradient ascent of both."""
    assert try_to_break(len(KINDS) * (kind % 5) + kind, measures=1, steps=6) >= 2
    assert try_to_break(len(KINDS) * ((kind + 2) % 5) + kind, measures=1, steps=0) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
def test_no_measure_beats_a_bound_on_a_thousand_problems(block: int) -> None:
    """1100 random problems, 10 random measures a threat, and gradient ascent of positions and masses on each."""
    tried = sum(try_to_break(10_000 + 11 * block + i, measures=10, steps=12) for i in range(11))
    assert tried > 100


def attacked(seed: int, budget: AttackBudget) -> int:
    """One problem: splitting and duplication attacks against the certificates; compare raises where one is inside."""
    kind, goal = KINDS[seed % len(KINDS)], GOALS[(seed // len(KINDS)) % len(GOALS)]
    problem, found = problem_or_none(seed, kind, goal), 0
    if problem is None:
        return 0
    asked: list[Threat] = [*threats(problem, room=1.3, goal=goal), Copies(1), Copies(2)]
    for threat in asked:
        comparison = compare(replace(problem, threat=threat), budget=budget)
        if comparison.certification.best is None:
            continue
        assert comparison.gap >= 1 - 1e-9
        assert comparison.problem == comparison.attack.problem == comparison.certification.problem
        found += comparison.status is Status.FOUND
    return found


@pytest.mark.parametrize("seed", [46])
def test_splitting_and_duplication_stay_outside(seed: int) -> None:
    assert attacked(seed, FEW) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(110))
def test_splitting_and_duplication_stay_outside_on_a_hundred_problems(seed: int) -> None:
    attacked(seed, QUICK)


# ---- exact cases -----------------------------------------------------------------------------------------------------


def one_head(a: list[list[float]], v: list[list[float]]) -> Attention:
    """Scores ``(A x_i) . x_j``, values ``V x_j``."""
    matrix, value = torch.tensor(a).double(), torch.tensor(v).double()
    eye = torch.eye(matrix.shape[0]).double()
    return Attention(w_q=matrix.T.contiguous()[None], w_k=eye[None], w_v=value.T.contiguous()[None], scale=1.0)


def radius_of(problem: Problem, threat: Threat, method: str) -> float:
    return certify(replace(problem, threat=threat), methods=[method]).certificates[0].radius


@pytest.mark.parametrize("threat", [CouplingBall(math.inf), WassersteinBall(math.inf)], ids=lambda t: t.key)
def test_one_token_without_scores_is_exact(threat: MeasureThreat) -> None:
    """A = 0: whatever the split, the output is V times the mean, so the radius is tolerance / |V|."""
    layer = one_head([[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]])
    clean = TokenMeasure(torch.tensor([[1.0, 2.0]]).double())
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.5))
    assert certify(replace(problem, threat=threat)).best.radius == pytest.approx(0.25, rel=2e-3)


@pytest.mark.parametrize("goal", ["displacement", "margin"])
def test_curvature_closes_the_gap_for_small_tolerances(goal: str) -> None:
    """Mean readout under W_2: exact to first order, so the gap tends to 1."""
    case = case_named("masses")
    made: Goal = Displacement(1e-7, pool="mean")
    if goal == "margin":
        weight = Draw(3)(2, 4)
        output = case.tokens.mass @ case.attention(case.tokens.points, case.tokens.mass)
        logits = weight @ output
        made = Margin(weight, bias=torch.stack([logits[1] - logits[0] + 1e-7, logits[0] * 0]), pool="mean", label=0)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), made)
    longest = float(torch.linalg.vector_norm(case.tokens.points, dim=1).max())
    threat = CouplingBall(2, domain_radius=longest)
    comparison = compare(replace(problem, threat=threat), methods=["measure-curvature"], budget=QUICK)
    assert 1.0 - 1e-6 <= comparison.gap <= 1.02


def test_a_tiny_mass_that_travels_far_is_covered() -> None:
    """x = +-3: the derivative and the own-query blocks allow a ratio of 1, a far journey has 1.633."""
    layer = one_head([[1.0]], [[1.0]])
    clean = TokenMeasure(torch.tensor([[3.0], [-3.0]]).double())
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(2e-3))
    threat = WassersteinBall(2, domain_radius=3.0)
    comparison = compare(replace(problem, threat=threat), budget=QUICK)
    assert comparison.status is Status.FOUND
    assert comparison.gap >= 1.0
    # tolerance / sqrt(n) is what W_2 of the outputs may reach
    assert 1.6 < 2e-3 / math.sqrt(2) / comparison.attack.radius < 1.634
    assert 2e-3 / math.sqrt(2) / comparison.certification.best.radius >= 1.633


def test_saturated_rows_do_not_move_until_scores_can_cross() -> None:
    """Scores 100 apart: every row reads one token, and only the value's own move counts."""
    layer = one_head([[10.0]], [[1.0]])
    clean = TokenMeasure(torch.tensor([[3.0], [-3.0]]).double())
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.5, pool=0))
    assert radius_of(problem, CouplingBall(math.inf), "measure-cluster") == pytest.approx(0.5, rel=2e-3)
    assert radius_of(problem, CouplingBall(math.inf), "measure-ball") < 0.01


# ---- lemmas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_highest_average_is_the_exact_maximum(seed: int) -> None:
    draw, n = Draw(seed), 5
    weights = torch.softmax(draw(1, 2, n, scale=2.0), dim=-1)
    half = draw(1, 2, n).abs()
    values = draw(3, 1, n)
    visible = torch.ones_like(weights, dtype=torch.bool)
    best = highest_average(weights, visible, half, values)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n))).double()
    moved = weights[..., None, :] * (signs * half[..., None, :]).exp()
    moved = moved / moved.sum(dim=-1, keepdim=True)
    brute = torch.einsum("hrsn,chn->chrs", moved, values).amax(dim=-1) - torch.einsum("hrn,chn->chr", weights, values)
    assert_close(best, brute, rtol=1e-12)


def test_highest_average_where_any_weight_is_possible() -> None:
    """A hidden token never counts, one whose weight underflows does."""
    weights = torch.tensor([[[1.0, 0.0, 0.0]]]).double()
    values = torch.tensor([[[0.0, 5.0, 9.0]]]).double()
    visible = torch.tensor([[[True, True, False]]])
    half = torch.tensor([[[0.0, 1000.0, 0.0]]]).double()
    assert highest_average(weights, visible, half, values).item() == 5.0


@pytest.mark.parametrize("seed", range(4))
def test_weight_change_bounds_every_single_weight(seed: int) -> None:
    draw, n = Draw(seed), 4
    weights = torch.softmax(draw(n, scale=6.0), dim=-1)
    half = draw(n).abs() * 3
    bound = largest_weight_change(weights, half + half.max())
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n))).double()
    moved = weights * (signs * half).exp()
    change = (moved / moved.sum(dim=-1, keepdim=True) - weights).abs().amax(dim=0)
    assert bool((change <= bound * (1 + 1e-12)).all())
    # attained where all half-ranges agree
    even = torch.full_like(half, float(half.max()))
    moved = weights * (signs * even).exp()
    change = (moved / moved.sum(dim=-1, keepdim=True) - weights).abs().amax(dim=0)
    assert_close(change, largest_weight_change(weights, 2 * even), rtol=1e-9)


def test_second_derivative_bound_holds_along_couplings() -> None:
    """``E |d^2/dt^2 Gamma(x_t)|`` by nested differentiation, never above the constant."""
    worst = 0.0
    for seed in range(30):
        draw = Draw(seed)
        layer = one_head((draw(2, 2) * 0.5).tolist(), [[1.0, 0.0], [0.0, 1.0]])
        mass = torch.softmax(draw(4, scale=3.0), dim=0)
        start, end = torch.tanh(draw(4, 2)) / 2**0.5, torch.tanh(draw(4, 2)) / 2**0.5

        def along(
            t: Tensor, start: Tensor = start, end: Tensor = end, layer: Attention = layer, mass: Tensor = mass
        ) -> Tensor:
            return layer(start + t * (end - start), mass)

        first: Callable[[Tensor], Tensor] = torch.func.jacrev(along)
        second = torch.func.jacrev(first)(torch.tensor(draw.uniform(0, 1)).double())
        found = float(mass @ torch.linalg.vector_norm(second, dim=-1))
        bound = float(second_derivative(layer, 1.0)[0]) * float(mass @ (end - start).square().sum(dim=-1))
        worst = max(worst, found / bound)
    assert 0.02 < worst <= 1.0


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_one_copy_has_a_closed_form() -> None:
    """``|change of row i| = P_ij / (1 + P_ij) |V (x_j - m_i)|`` for one head, and the worst one is found."""
    draw = Draw(0)
    layer = one_head((draw(3, 3) * 0.7).tolist(), draw(3, 3).tolist())
    clean = TokenMeasure(draw(5, 3))
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.7, pool=2))
    weights = layer.weights(clean.points)[0]
    values = layer.values(clean.points)[0]
    size = torch.linalg.vector_norm(values[None] - (weights @ values)[:, None], dim=-1)
    exact = (weights / (1 + weights) * size)[2]  # of every token j, on row 2
    worst = worst_copies(problem, copies=1)
    assert worst.extra.index(1) == int(exact.argmax())
    assert worst.usage == pytest.approx(float(exact.max()) / 0.7, rel=1e-12)
    effect = torch.linalg.vector_norm(duplication_effect(layer, clean.points), dim=-1)
    assert_close(effect[:, 2], exact, rtol=1e-12)


@pytest.mark.parametrize("name", ["masses", "finite-mask", "causal-masses", "plain-h2-n3-d4", "single-token"])
@pytest.mark.parametrize("pool", ["all", "mean", 0])
def test_worst_copies_is_what_inserted_tokens_do(name: str, pool: Pool) -> None:
    """Tokens written several times with their masses, through the attack's own expansion."""
    case = case_named(name)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1, pool=pool))
    worst = worst_copies(problem, copies=2)
    result = attack(replace(problem, threat=Copies(2)), epsilon=1e-12, budget=FEW)
    assert_at_most(result.usage, worst.usage + 1e-9, rtol=1e-9)
    assert worst.usage == pytest.approx(result.usage, rel=0.3, abs=1e-9)  # greedy copies come near the enumeration


def test_copies_that_violate_the_goal_leave_no_radius() -> None:
    problem = Problem(case_named("plain-h2-n3-d4").attention, case_named("plain-h2-n3-d4").tokens, FrobeniusBall(),
                      Displacement(1e-3))  # fmt: skip
    comparison = compare(replace(problem, threat=Copies(1)), budget=QUICK)
    assert worst_copies(problem).usage > 1
    assert comparison.attack.radius == 0.0
    assert comparison.certification.best.radius == 0.0


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        ("padding", FrobeniusBall()),
        ("plain-h2-n3-d4", FrobeniusBall(tokens=(1,))),
        ("plain-h2-n3-d4", PerTokenBall("linf")),
        pytest.param("padding", PerTokenBall(), marks=pytest.mark.slow),
        pytest.param("masses", FrobeniusBall(), marks=pytest.mark.slow),
        pytest.param("plain-h2-n3-d4", PerTokenBall(), marks=pytest.mark.slow),
    ],
)
def test_copies_that_move_stay_outside(name: str, threat: FrobeniusBall | PerTokenBall) -> None:
    case = case_named(name)
    pools: tuple[Pool, ...] = ("all", "mean", 1)
    for pool in pools:
        problem = Problem(case.attention, case.tokens, Copies(1, moves=threat), Displacement(3.0, pool=pool))
        comparison = compare(problem, budget=FEW)
        assert comparison.certification.best.radius > 0
        assert comparison.gap >= 1.0


# ---- what is asked ---------------------------------------------------------------------------------------------------


def ask(threat: Threat, *, name: str = "plain-h2-n3-d4", pool: Pool = "all") -> Problem:
    case = case_named(name)
    return Problem(case.attention, case.tokens, threat, Displacement(0.1, pool=pool))


@pytest.mark.parametrize(
    ("threat", "name", "pool", "words"),
    [
        (WassersteinBall(2), "plain-h2-n3-d4", "all", ["declare", "within:R"]),
        (CouplingBall(1), "plain-h2-n3-d4", "mean", ["declare", "within:R"]),
        (WassersteinBall(math.inf), "plain-h2-n3-d4", 0, ["row", "coupling:inf"]),
        (CouplingBall(2, domain_radius=9.0), "plain-h2-n3-d4", 0, ["row 0", "coupling:inf", "mean"]),
        (WassersteinBall(math.inf), "causal", "all", ["mask", "coupling:inf"]),
        (WassersteinBall(2, domain_radius=9.0), "finite-mask", "all", ["mask", "parent"]),
        (CouplingBall(2, domain_radius=9.0), "finite-mask", "mean", ["additive mask", "coupling:inf"]),
        (CouplingBall(1, domain_radius=9.0), "causal", "mean", ["Hardy", "coupling:2"]),
        (Copies(1, order="strict"), "causal", "all", ["tied"]),
        (Copies(12), "masses-long", "all", ["fewer copies"]),
    ],
    ids=str,
)
def test_what_is_not_sound_is_refused_with_a_cure(threat: Threat, name: str, pool: Pool, words: list[str]) -> None:
    report = certify(ask(threat, name=name, pool=pool))
    assert report.best is None
    for word in words:
        assert word in report.why_none


def test_other_threats_layers_and_names_are_refused() -> None:
    case = case_named("plain-h2-n3-d4")
    with refused(UnsupportedThreatError, "frobenius or per-token"):
        Copies(1, moves=AnyToken())
    layer = L2Attention(w_q=torch.eye(4)[None], w_v=torch.eye(4)[None])
    other = Problem(layer, case.tokens, CouplingBall(math.inf), Displacement(0.1))
    assert all(
        "L2Attention" in s.reason or "KimL2" in s.method or "threats" in s.reason for s in certify(other).skipped
    )
    assert certify(other).best is None
    with refused(UnsupportedThreatError, "L2Attention"):
        worst_copies(other)
    with refused(InputError, "outside of the domain radius"):
        ask(CouplingBall(2, domain_radius=0.01))
    with refused(UnknownNameError, "measure-ball"):
        certify(ask(CouplingBall(math.inf)), methods=["measure-bal"])
    with refused(UnsupportedThreatError, "mass-splitting"):
        compare(ask(CouplingBall(math.inf)), attack="token-moving")


@pytest.mark.parametrize(
    "order", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(math.inf, marks=pytest.mark.slow)]
)
def test_sigmoid_attention_has_no_exponential(order: float) -> None:
    draw = Draw(5)
    layer = SigmoidAttention(w_q=draw(2, 3, 2), w_k=draw(2, 3, 2), w_v=draw(2, 3, 2), w_o=draw(2, 2, 2), shift=0.3)
    clean = TokenMeasure(draw(4, 3), torch.softmax(draw(4), dim=0))
    pools: tuple[Pool, ...] = ("all", "mean") if order == 1 else ("all",)
    for pool in pools:
        problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.2, pool=pool))
        threat = WassersteinBall(order, domain_radius=5.0)
        comparison = compare(replace(problem, threat=threat), budget=FEW)
        assert comparison.certification.best.radius > 0
        assert comparison.gap >= 1.0


def test_attack_and_certificate_answer_the_same_question_and_no_other() -> None:
    problem = ask(CouplingBall(2, domain_radius=9.0))
    certification, result = certify(problem), attack(problem, budget=FEW)
    assert join(problem, result, certification).gap >= 1
    assert result.problem == certification.problem == problem.digest
    others = (FrobeniusBall(), CouplingBall(2, domain_radius=8.0), WassersteinBall(2, domain_radius=9.0),
              CouplingBall(2, domain_radius=9.0, tokens=(0, 1)))  # fmt: skip
    for other in others:
        with refused(InputError, "compare results of the same"):
            join(ask(other), result, certification)


def test_a_contradiction_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that forgets the query part is caught by the splitting attack."""
    from attnrobust.certify.measures import cluster as measure_cluster

    monkeypatch.setattr(measure_cluster, "_displaced", lambda *_: torch.zeros(1, dtype=torch.float64))
    with pytest.raises(UnsoundError, match="measure-cluster"):
        compare(ask(CouplingBall(math.inf)), budget=QUICK)


def test_duplicated_tokens_are_inside_the_wasserstein_ball_that_holds_them() -> None:
    """One copy at rest is a measure at the distance that transport says; every bound covers it."""
    for seed in range(2):
        problem = problem_or_none(seed * len(KINDS), "plain", "mean")
        assert problem is not None
        n, clean = problem.clean.n, problem.clean
        for order, j in product((1, 2, math.inf), range(n)):
            radius = float(torch.linalg.vector_norm(clean.points, dim=1).max())
            prepared = Prepared.of(problem, WassersteinBall(order, domain_radius=radius))
            mass = clean.mass.clone()
            mass[j] *= 2
            prepared.check(PerturbedTokens(clean.points, mass / mass.sum(), torch.arange(n)))
