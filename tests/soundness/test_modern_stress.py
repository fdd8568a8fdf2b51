"""No attack passes a bound of a layer with rotary positions, position biases, windows or grouped keys.

Margins: both majorants are attacked pointwise, where they are exact, at first, balanced and random parameters.
Displacements: one evaluation of the bound per problem tests the claim exactly where it is tight.
``benchmarks/modern_soundness.py`` runs thousands of seeds.
"""

import math
from functools import partial

import pytest
import torch

from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.certify.margin.one_token.descent import named
from attnrobust.certify.margin.one_token.functional import TokenFunctionalBound
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken
from tests import displacement_problems, margin_problems
from tests.certify.margin.all_tokens import test_method as all_tokens
from tests.certify.margin.one_token import test_method as one_token
from tests.modern_layers import modern_problem
from tests.soundness.test_displacement_stress import rounding
from tests.soundness.test_margin_stress import ROUNDING, SIZES, THREATS, scaled
from tests.stress import Draw, Tally, finite_bound, largest_usage


def kinds(problem: Problem) -> str:
    """The newer parts of the layer."""
    layer = problem.network
    assert isinstance(layer, Attention)
    found = sorted(layer.features & {"rotary", "head_bias", "window"}) + ["grouped"] * (layer.kv_heads is not None)
    return "+".join(found) or "plain"


def margin_problem(seed: int, draw: Draw, *, single: bool) -> tuple[Problem, float]:
    """A problem about a modern layer, and a radius between a hundredth and twice a token's size."""
    threat = AnyToken() if single else THREATS[seed % (len(THREATS) - 1)]
    problem = margin_problems.random_problem(draw.integer(0, 2**31), threat)
    problem = modern_problem(scaled(problem, SIZES[draw.integer(0, len(SIZES) - 1)]), draw)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    return problem, scale * 10 ** draw.between(-2.0, 0.3)


def attack_margin(seed: int, tally: Tally, *, steps: int) -> None:
    """1 + the largest relative excess of the drop over the majorant of all moving tokens (Theorem 1)."""
    problem, radius = margin_problem(seed, Draw(2**22 + seed), single=False)
    worst = all_tokens.worst_excess(problem, radius, seed, steps=steps)
    if worst > -math.inf:  # else the logits leave the exponents
        tally.add(f"margin, all tokens: {kinds(problem)}", 1.0 + worst - ROUNDING, seed=seed)


def attack_token_margin(seed: int, tally: Tally, monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    """The same for every single moving token (Theorem 2), at first and random parameters."""
    problem, radius = margin_problem(seed, Draw(2**24 + seed), single=True)
    with monkeypatch.context() as patch:
        patch.setattr(one_token, "majorants", _majorants)
        worst = one_token.worst_excess(problem, radius, seed, steps=steps)
    if worst > -math.inf:
        tally.add(f"margin, one token: {kinds(problem)}", 1.0 + worst - ROUNDING, seed=seed)


def _majorants(
    bound: TokenFunctionalBound, radius: float, draw: Draw
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    found = bound.at_radius(radius, bound.tokens)
    if found is None:
        return []
    first = bound.start_parameters(found)
    others = (named(first, partial(margin_problems.perturbed, draw)) for _ in range(2))
    parts = [bound.quadratic_majorant(found, par) for par in (first, *others)]
    return [(constant, gradient, matrix) for matrix, gradient, constant in parts]


def attack_displacement(seed: int, tally: Tally, *, steps: int) -> None:
    """Reached over bound of the displacement certificate at a radius of one problem."""
    draw = Draw(2**23 + seed)
    kind = displacement_problems.THREATS[seed % len(displacement_problems.THREATS)]
    problem = modern_problem(displacement_problems.random_problem(draw.integer(0, 2**31), kind), draw)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    prepared = DisplacementCertificate().prepare(problem, seed=seed)
    radius, bound = finite_bound(prepared, scale * 10 ** draw.between(-4.0, 1.0), smallest=1e-12 * scale)
    assert bound < math.inf  # otherwise the attack would say nothing
    reached = largest_usage(problem, radius, draw, steps=steps)
    tally.add(f"displacement: {kinds(problem)}", reached / (bound + rounding(problem)), seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_no_attack_passes_a_margin_bound(seed: int, tally: Tally) -> None:
    attack_margin(seed, tally, steps=8)


@pytest.mark.parametrize("seed", range(4))
def test_no_attack_passes_a_bound_of_one_token(seed: int, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    attack_token_margin(seed, tally, monkeypatch, steps=6)


@pytest.mark.parametrize("seed", range(7))
def test_no_attack_passes_a_displacement_bound(seed: int, tally: Tally) -> None:
    attack_displacement(seed, tally, steps=12)
