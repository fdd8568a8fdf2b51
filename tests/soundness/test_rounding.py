"""Budgets beside their rounding: what overflowed or drowned is refused, what is left is charged to both sides."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.comparison import compare
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, refused

QUICK = AttackBudget(restarts=4, steps=20, rounds=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYER = Attention(w_q=draw(1, 3, 2), w_k=draw(1, 3, 2, seed=1), w_v=draw(1, 3, 3, seed=2))
TOKENS = TokenMeasure(draw(4, 3, seed=3))
READOUT = draw(2, 3, seed=4)


def scaled(factor: float) -> Attention:
    return replace(LAYER, w_v=factor * LAYER.w_v)


@pytest.mark.parametrize(
    ("layer", "goal"),
    [
        (scaled(1e10), Margin(1e300 * READOUT)),
        (scaled(1e150), Margin(1e150 * READOUT)),
        (scaled(1e155), Displacement(0.1, relative=True)),
        (scaled(1e160), Displacement(0.1)),
        (LAYER, Displacement(1e-170)),
        (LAYER, Displacement(1e200)),
        (scaled(1e-160), Displacement(0.1, relative=True)),
        (scaled(1e-100), Margin(1e-100 * READOUT)),
    ],
    ids=["logits", "products", "norm", "output", "below-squares", "above-squares", "tiny-norm", "tiny-margin"],
)
def test_numbers_that_overflow_or_whose_squares_do_are_refused(layer: Attention, goal: Goal) -> None:
    with refused(InputError):
        Problem(layer, TOKENS, FrobeniusBall(), goal)


@pytest.mark.parametrize("tolerance", [1e-14, 1e-15, 1e-17])
def test_a_tolerance_below_the_rounding_of_the_output_is_refused(tolerance: float) -> None:
    layer = replace(LAYER, w_o=torch.eye(3)[None], b_o=torch.ones(3))
    with refused(InputError, "rounding", "larger tolerance or margin"):
        Problem(layer, TOKENS, FrobeniusBall(), Displacement(tolerance))


def margin_of(size: float, margin: float) -> Margin:
    """Two classes whose logits have about this size and differ by about this margin."""
    pooled = LAYER(TOKENS.points).mean(dim=0)
    apart = float((READOUT[0] - READOUT[1]) @ pooled)
    return Margin(READOUT, bias=torch.tensor([size, size + apart - margin], dtype=torch.float64), label=0)


def test_a_margin_below_the_rounding_of_its_logits_is_refused() -> None:
    with refused(InputError, "rounding"):
        Problem(LAYER, TOKENS, FrobeniusBall(), margin_of(1e12, 1e-4))


@pytest.mark.parametrize(("size", "margin"), [(30.0, 1e-10), (1e12, 0.1), (1e6, 1e-3)])
def test_what_a_margin_rounds_is_charged_to_both_sides(size: float, margin: float) -> None:
    """The exact margin, from the exact mean of the tokens' rational values (one token moves nothing else)."""
    layer = Attention(w_q=torch.zeros(1, 3, 1), w_k=torch.zeros(1, 3, 1), w_v=torch.eye(3)[None])
    pooled = TOKENS.points.mean(dim=0)
    apart = float((READOUT[0] - READOUT[1]) @ pooled)
    bias = torch.tensor([size, size + apart - margin], dtype=torch.float64)
    problem = Problem(layer, TOKENS, FrobeniusBall(), Margin(READOUT, bias=bias, label=0))
    means = [sum(map(Fraction, column)) / 4 for column in TOKENS.points.T.tolist()]
    logits = [
        sum(Fraction(w) * m for w, m in zip(row, means, strict=True)) + Fraction(b)
        for row, b in zip(READOUT.tolist(), bias.tolist(), strict=True)
    ]
    exact = logits[0] - logits[1]
    resolved = problem.resolved
    assert resolved.rounding is not None
    computed, rounding = Fraction(float(resolved.budgets[0])), Fraction(float(resolved.rounding[0]))
    assert abs(computed - exact) <= rounding
    assert computed / exact <= Fraction(resolved.outward)
    slope = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(*READOUT.tolist(), strict=True)) / 4
    best = certify(problem).best
    assert best is not None
    assert Fraction(best.radius) ** 2 * slope <= exact**2, "a certified radius breaks the exact margin"
    radius = Fraction(attack(problem, budget=QUICK).radius)
    assert radius**2 * slope >= exact**2, "a violation that is none"


@pytest.mark.parametrize("tolerance", [1e-12, 1e-11, 1e-9, 1e-3])
def test_the_attack_wins_by_more_than_rounding(tolerance: float) -> None:
    layer = replace(LAYER, w_o=torch.eye(3)[None], b_o=torch.ones(3))
    comparison = compare(Problem(layer, TOKENS, FrobeniusBall(), Displacement(tolerance)), budget=QUICK)
    assert comparison.status is Status.FOUND
    assert comparison.certification.best is not None
    assert_at_most(comparison.certification.best.radius, comparison.attack.radius)


def test_a_far_move_must_win_by_what_rounds_there() -> None:
    """Where the moved tokens make the output large, more is lost than at the clean input."""
    problem = Problem(LAYER, TOKENS, FrobeniusBall(), Displacement(0.5))
    assert problem.usage_rounding(TOKENS.points) <= 1e-15
    assert problem.usage_rounding(1e9 * TOKENS.points) > 1e-6
