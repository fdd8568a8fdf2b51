"""No attack passes a bound of a layer with rotary positions, position biases, windows or grouped keys.

As in the stress tests of the margin and displacement certificates: one evaluation of the bound per problem tests the
claim exactly where it is tight. ``benchmarks/modern_soundness.py`` runs thousands of seeds.
"""

import math

import pytest

from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.certify.margin.all_tokens.method import MarginCertificate
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate
from attnrobust.problem import Problem
from tests import displacement_problems, margin_problems
from tests.modern_layers import modern_problem
from tests.soundness.test_displacement_stress import rounding
from tests.soundness.test_margin_stress import ROUNDING, SIZES, THREATS, scaled
from tests.stress import Draw, Tally, finite_bound, largest_usage


def kinds(problem: Problem) -> str:
    """The newer parts of the layer."""
    found = sorted(problem.network.features & {"rotary", "head_bias", "window"})  # type: ignore[attr-defined]
    return "+".join(found) or "plain"


def attack_margin(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over bound of the margin certificates at a radius of one problem."""
    draw = Draw(2**22 + seed)
    problem = margin_problems.random_problem(draw.integer(0, 2**31), THREATS[seed % len(THREATS)])
    problem = modern_problem(scaled(problem, SIZES[draw.integer(0, len(SIZES) - 1)]), draw)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for method in (MarginCertificate(), MarginTokenCertificate()):
        if method.refuses(problem) is not None:
            continue
        prepared = method.prepare(problem, seed=seed)
        radius, bound = finite_bound(prepared, scale * 10 ** draw.between(-2.0, 0.3), smallest=1e-6 * scale)
        for share in (1.0, 0.999):
            reached = largest_usage(problem, share * radius, draw, steps=steps)
            tally.add(f"{method.name} {kinds(problem)}", reached / (bound + ROUNDING), seed=seed)


def attack_displacement(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over bound of the displacement certificate at a radius of one problem."""
    draw = Draw(2**23 + seed)
    kind = displacement_problems.THREATS[seed % len(displacement_problems.THREATS)]
    problem = modern_problem(displacement_problems.random_problem(draw.integer(0, 2**31), kind), draw)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    prepared = DisplacementCertificate().prepare(problem, seed=seed)
    radius, bound = finite_bound(prepared, scale * 10 ** draw.between(-4.0, 1.0), smallest=1e-12 * scale)
    assert bound < math.inf  # otherwise the attack would say nothing
    for share in (1.0, 0.999):
        reached = largest_usage(problem, share * radius, draw, steps=steps)
        tally.add(f"displacement {kinds(problem)}", reached / (bound + rounding(problem)), seed=seed)


@pytest.mark.parametrize("seed", range(7))
def test_no_attack_passes_a_margin_bound(seed: int, tally: Tally) -> None:
    attack_margin(seed, tally, steps=12)


@pytest.mark.parametrize("seed", range(7))
def test_no_attack_passes_a_displacement_bound(seed: int, tally: Tally) -> None:
    attack_displacement(seed, tally, steps=12)
