"""Certificates for token measures: nothing that random, gradient or splitting attacks find is inside; exact cases."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.comparison import compare, join
from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Pool
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import PerturbedTokens, TokenMeasure
from tests.assertions import refused
from tests.measure_problems import (
    GOALS,
    KINDS,
    Draw,
    Prepared,
    ascended_atoms,
    ask,
    one_head,
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


@pytest.mark.parametrize("threat", [CouplingBall(math.inf), WassersteinBall(math.inf)], ids=lambda t: t.key)
def test_one_token_without_scores_is_exact(threat: MeasureThreat) -> None:
    """A = 0: whatever the split, the output is V times the mean, so the radius is tolerance / |V|."""
    layer = one_head([[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]])
    clean = TokenMeasure(torch.tensor([[1.0, 2.0]]).double())
    problem = Problem(layer, clean, FrobeniusBall(), Displacement(0.5))
    assert certify(replace(problem, threat=threat)).best.radius == pytest.approx(0.25, rel=2e-3)


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


# ---- what is asked ---------------------------------------------------------------------------------------------------


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
