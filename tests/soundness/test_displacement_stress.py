"""No attack passes a displacement bound: at a certified radius, and just inside it, ascent never moves the output more.

A radius is certified for every tolerance that is at least the bound there, so one evaluation of the bound per problem
tests the claim exactly where it is tight. Every fifth problem is certified by the search as well.
"""

import math

import pytest

from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from tests.displacement_problems import THREATS, random_problem
from tests.stress import Draw, Tally, finite_bound, largest_usage

ROUNDING = 1e-14  # of one forward pass: scores and values are sums of a few dozen products
METHOD = DisplacementCertificate()


def rounding(problem: Problem) -> float:
    """How far rounding alone may move the output, as a share of the budget."""
    layer, x = problem.network, problem.clean.points
    assert isinstance(layer, Attention)
    scores = layer.scores(x, problem.mass)
    scores = scores[scores.isfinite()].abs().max()
    size = (1.0 + scores) * (layer.values(x).norm() + problem.clean_output.norm())
    return ROUNDING * float(size / problem.resolved.budgets[0])


def attack_bound(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over bound at a radius between 1e-4 and 10 of a token's size."""
    kind = THREATS[seed % len(THREATS)]
    problem, draw = random_problem(seed, kind), Draw(2**20 + seed)
    assert METHOD.refuses(problem) is None
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    prepared = METHOD.prepare(problem, seed=seed)
    radius, used = finite_bound(prepared, scale * 10 ** draw.between(-4.0, 1.0), smallest=1e-12 * scale)
    assert used < math.inf  # otherwise the attack would say nothing
    attack_at(problem, radius, used, kind, draw, tally, seed=seed, steps=steps)


def attack_certificate(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over tolerance at the radius that the search returns."""
    kind = THREATS[seed % len(THREATS)]
    problem = random_problem(seed, kind)
    radius = METHOD.certify(problem, seed=seed).radius
    assert radius > 0
    attack_at(problem, radius, 1.0, f"{kind}, searched radius", Draw(2**21 + seed), tally, seed=seed, steps=steps)


def attack_at(
    problem: Problem, radius: float, bound: float, name: str, draw: Draw, tally: Tally, *, seed: int, steps: int
) -> None:
    for share in (1.0, 0.999):
        reached = largest_usage(problem, share * radius, draw, steps=steps)
        tally.add(name, reached / (bound + rounding(problem)), seed=seed)


@pytest.mark.parametrize("seed", range(14))
def test_no_attack_passes_the_bound(seed: int, tally: Tally) -> None:
    attack_bound(seed, tally, steps=12)


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_passes_a_certificate(seed: int, tally: Tally) -> None:
    attack_certificate(seed, tally, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(28))
def test_no_attack_passes_the_bound_on_many_problems(block: int, tally: Tally) -> None:
    """1400 problems: python -m pytest -n0 -s -m slow tests/soundness/test_displacement_stress.py."""
    before = tally.attacks.total()
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        attack_bound(seed, tally, steps=40)
        if seed % 5 == 0:
            attack_certificate(seed, tally, steps=40)
    assert tally.attacks.total() - before == 120
