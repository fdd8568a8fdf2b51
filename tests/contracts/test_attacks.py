"""What every attack owes: points of the set, numbers that a second measurement gives again, no hidden randomness."""

import math
from dataclasses import replace
from typing import cast

import pytest
import torch

from attnrobust.attacks import (
    ATTACKS,
    AttackBudget,
    AttackMethod,
    attack,
    attack_for,
    attack_many,
    attack_named,
    duplication_effect,
)
from attnrobust.attacks.measures.expand import expand_layer
from attnrobust.attacks.measures.goal import MeasureReader
from attnrobust.attacks.search.pullback import covers
from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError, UnsupportedThreatError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from tests.assertions import assert_same_bits
from tests.contracts.questions import GOALS, THREATS, Rotary, ask, attention

QUICK = AttackBudget(restarts=2, steps=3, rounds=1)
NAMES = (*(method.name for method in ATTACKS), "foolbox:DDN")
EXAMPLES: dict[str, tuple[Problem, ...]] = {
    name: tuple(
        ask(threat=threat, goal=goal)
        for threat in (FrobeniusBall(), AnyToken(), CouplingBall(2, domain_radius=4.0), Copies(1, moves=PerTokenBall()))
        for goal in GOALS
        if isinstance(threat, attack_named(name).threats)
    )[:3]
    for name in NAMES
}
each = pytest.mark.parametrize("name", NAMES)


def usage_again(problem: Problem, result: AttackResult) -> float:
    """Used budget at the returned point, by the layer itself."""
    atoms = result.atoms
    assert result.perturbed is not None
    if atoms is None:
        return float(problem.resolved.usage(problem.network(result.perturbed)))
    if isinstance(problem.threat, MeasureThreat):
        return float(MeasureReader(problem, atoms.mass, atoms.parent).usage(atoms.points[None])[0])
    output = expand_layer(problem.network, atoms.parent, problem.clean.n)(atoms.points)
    # the goals of the examples read the mean of all atoms
    drop = output.mean(dim=0) - problem.resolved.clean
    if problem.resolved.functionals is None:
        return float(torch.linalg.vector_norm(drop) / problem.resolved.budgets[0])
    return float((-(problem.resolved.functionals @ drop) / problem.resolved.budgets).max())


def distance_again(problem: Problem, result: AttackResult) -> float:
    """Distance of the returned point, by the threat itself."""
    threat, atoms = problem.threat, result.atoms
    assert result.perturbed is not None
    if isinstance(threat, MeasureThreat):
        assert atoms is not None
        return threat.distance(problem.clean, atoms)
    if isinstance(threat, Copies):
        moves = replace(cast("PerTokenBall", threat.moves), tokens=None)
        return float(moves.distance(atoms.displacement(problem.clean)))
    assert isinstance(threat, MoveThreat)
    return float(threat.distance(result.perturbed - problem.clean.points))


@each
@pytest.mark.parametrize("epsilon", [None, 0.4])
def test_points_stay_in_the_set_and_are_measured_again(name: str, epsilon: float | None) -> None:
    for problem in EXAMPLES[name]:
        result = attack(problem, method=name, epsilon=epsilon, budget=QUICK)
        assert result.attack == name
        assert result.problem == problem.digest
        if result.perturbed is None:
            assert result.radius == math.inf
            continue
        assert result.radius == pytest.approx(distance_again(problem, result), rel=1e-12, abs=1e-300)
        assert result.usage == pytest.approx(usage_again(problem, result), rel=1e-9)
        assert (result.status is Status.FOUND) == (result.usage >= 1.0)
        if epsilon is not None:
            assert result.radius <= epsilon * (1 + 1e-9)
        if result.atoms is not None:
            assert_same_bits(result.atoms.points, result.perturbed)
            assert result.gain >= 1.0 - 1e-9


@each
def test_results_depend_on_the_seed_alone_and_not_on_the_batch(name: str) -> None:
    problems = EXAMPLES[name]
    together = attack_many([*problems, *problems[:1]], method=name, seed=5, budget=QUICK)
    for problem, row in zip(problems, together, strict=False):
        alone = attack(problem, method=name, seed=5, budget=QUICK)
        assert (alone.status, alone.radius, alone.usage) == (row.status, row.radius, row.usage)
    assert together[0].radius == together[-1].radius


def test_many_problems_of_every_threat_go_to_their_own_attacks() -> None:
    problems = [ask(threat=threat) for threat in THREATS]
    rows = attack_many(problems, budget=AttackBudget(restarts=1, steps=1, rounds=1))
    assert [row.problem for row in rows] == [problem.digest for problem in problems]
    assert [row.attack for row in rows] == [attack_for(problem.threat).name for problem in problems]


@each
def test_other_threats_are_refused_with_the_right_name(name: str) -> None:
    method = attack_named(name)
    for threat in THREATS:
        if not isinstance(threat, method.threats):
            with pytest.raises(UnsupportedThreatError, match=f"name '{attack_for(threat).name}'"):
                attack(ask(threat=threat), method=name)
            (row,) = attack_many([ask(threat=threat)], method=name)
            assert row.status is Status.ERROR
            assert threat.key in row.note


def test_every_threat_has_an_attack_and_names_are_unique() -> None:
    assert len({method.name for method in ATTACKS}) == len(ATTACKS)
    for threat in THREATS:
        assert isinstance(threat, attack_for(threat).threats)
    with pytest.raises(UnknownNameError, match="mass-splitting"):
        attack(ask(), method="mass-spliting")


# ---- layers that the closed forms do not know --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["subclass", "feature"])
def test_closed_forms_refuse_what_they_do_not_know(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attention(Rotary) if kind == "subclass" else attention()
    if kind == "feature":
        monkeypatch.setattr(Attention, "features", frozenset({"gated"}))
    assert not covers(layer)
    word = "Rotary" if kind == "subclass" else "gated"
    for threat in (Copies(1), CouplingBall(2), WassersteinBall(math.inf)):
        with pytest.raises(UnsupportedThreatError, match=word):
            attack(ask(layer, threat), budget=QUICK)
    with pytest.raises(UnsupportedModelError):
        duplication_effect(layer, ask().clean.points)


def test_moving_attacks_a_subclass_by_its_own_formula() -> None:
    problem = ask(attention(Rotary), goal=Displacement(0.5))
    result = attack(problem, budget=QUICK)
    assert result.status is Status.FOUND
    assert result.usage == pytest.approx(usage_again(problem, result), rel=1e-12)


def test_an_attack_may_be_given_as_an_object() -> None:
    method: AttackMethod = ATTACKS[0]
    assert attack(ask(), method=method, budget=QUICK).radius == attack(ask(), budget=QUICK).radius
    with pytest.raises(InputError, match="epsilon"):
        attack(ask(), epsilon=-1.0)
