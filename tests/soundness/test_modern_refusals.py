"""Every method on a layer with each of the newer parts: it refuses, or no attack finds a violation below its radius."""

from typing import Any

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.errors import UnsupportedModelError, UnsupportedThreatError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.rotary import Rotary
from attnrobust.lipschitz.at_an_input import local_norm_upper
from attnrobust.lipschitz.contraction import contraction
from attnrobust.lipschitz.table import bounds_table
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall
from tests.contracts.questions import GOALS, THREATS, N, ask, attention, draw

PARTS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary": Rotary(torch.tensor([1.5])), "b_k": 2.0 * draw(1, 2, seed=3)},
    "head_bias": {"head_bias": HeadBias(explicit=2.0 * draw(1, N, N, seed=4))},
    "window": {"window_left": 1, "window_right": 0},
}
QUICK = AttackBudget(restarts=4, steps=20, rounds=1)
TURNS = {"margin-majorant", "margin-one-token", "displacement", "pre-norm-scales", "pre-norm-margin"}
"""The certificates whose proofs cover rotary positions."""
WEIGHTS = TURNS | {"havens2024-local", "spread-lipschitz", "singla2020-curvature", "conic-margin", "rigorous-local"}
"""Those that read biases of positions and windows from the clean weights."""


@pytest.mark.parametrize("part", PARTS)
def test_every_method_is_known_to_cover_the_part_or_refuses_it(part: str) -> None:
    methods = (*METHODS, *ON_REQUEST)
    covered = {method.name for method in methods if part in method.features}
    assert covered == (TURNS if part == "rotary" else WEIGHTS)
    for method in methods:
        if Attention in method.layers and method.name not in covered:
            for threat in THREATS:
                problem = ask(attention(**PARTS[part]), threat)
                if type(threat) in method.threats:
                    assert part in str(method.refuses(problem))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("question", [(FrobeniusBall(), 1), (AnyToken(), 0)], ids=["all-margin", "any-displacement"])
def test_moves_are_refused_or_certified_below_the_attack(part: str, question: tuple[Any, int]) -> None:
    problem = ask(attention(**PARTS[part]), question[0], GOALS[question[1]])
    report = certify(problem)
    found = attack(problem, budget=QUICK)
    assert report.best is not None
    for certificate in report.certificates:
        assert certificate.radius <= found.radius * (1.0 + 1e-9), certificate.method
    undeclared = [skipped.reason for skipped in report.skipped if not skipped.declared]
    assert all(part in reason or "it speaks about" in reason for reason in undeclared), undeclared


@pytest.mark.parametrize("part", PARTS)
def test_copies_and_measures_are_refused_by_name(part: str) -> None:
    layer = attention(**PARTS[part])
    for threat in (Copies(1), CouplingBall(2), WassersteinBall(2, domain_radius=4.0)):
        problem = ask(layer, threat)
        report = certify(problem)
        assert report.certificates == ()
        with pytest.raises(UnsupportedThreatError, match=part):
            attack(problem, budget=QUICK)


@pytest.mark.parametrize("part", PARTS)
def test_constants_of_measures_are_refused(part: str) -> None:
    layer = attention(**PARTS[part])
    with pytest.raises(UnsupportedModelError):
        contraction(layer, radius=1.0)
    assert bounds_table(layer, n=N, radius=1.0, search=0).bounds == ()


def test_closed_bounds_of_the_derivative_refuse_turns() -> None:
    jacobian = AttentionJacobian(attention(**PARTS["rotary"]), ask().clean.points)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        local_norm_upper(jacobian)
