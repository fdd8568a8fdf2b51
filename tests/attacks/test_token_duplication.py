"""Token duplication: the closed form against forward passes, budgets, causal semantics, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack, duplication_effect, token_duplication
from attnrobust.attacks.measures.expand import expand_layer
from attnrobust.attacks.method import Work
from attnrobust.attacks.token_duplication import Choice, choose_copies, move_copies
from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.network import Network
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.copies import CausalOrder, Copies
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close
from tests.cases import Case, case_named

QUICK = AttackBudget(restarts=2, steps=10, rounds=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inserted(case: Case, token: int, copies: int) -> Tensor:
    """Output rows of the original tokens when copies of one token are inserted behind it, by a forward pass."""
    counts = torch.ones(case.n, dtype=torch.int64)
    counts[token] += copies
    parent = torch.arange(case.n).repeat_interleave(counts)
    layer = expand_layer(case.attention, parent, case.n, order="tied")
    first = torch.cat([torch.tensor([True]), parent.diff() > 0])
    mass = None if case.tokens.uniform else case.tokens.mass[parent]
    return layer(case.tokens.points[parent], mass)[first]


@pytest.mark.parametrize("copies", [1, 3])
def test_closed_form_is_the_forward_pass(case: Case, copies: int) -> None:
    mass = None if case.tokens.uniform else case.tokens.mass
    effect = duplication_effect(case.attention, case.tokens.points, mass, copies=copies)
    clean = case.attention(case.tokens.points, mass)
    for token in {0, case.n // 2, case.n - 1}:
        assert_close(clean + effect[token], inserted(case, token, copies), rtol=1e-11, atol=1e-13)


def test_a_copy_is_mass_where_nothing_is_masked() -> None:
    case = case_named("biases")
    mass = torch.ones(case.n, dtype=torch.float64)
    mass[2] = 3.0
    heavier = case.attention(case.tokens.points, mass / mass.sum())
    assert_close(heavier, inserted(case, 2, 2), rtol=1e-12)


@pytest.mark.parametrize("goal", [Displacement(0.3), Displacement(0.1, pool="mean"), Displacement(0.2, pool=1)])
@pytest.mark.parametrize("name", ["biases", "causal", "finite-mask"])
def test_the_first_copy_is_the_best_single_one(name: str, goal: Goal) -> None:
    """The closed-form choice agrees with trying every token by the expanded forward pass."""
    case = case_named(name)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), goal)
    by_formula, _ = choose_copies(problem, 1)
    strict = case.attention.causal
    if not strict:
        by_forward, queries = choose_copies(problem, 1, order="strict")
        assert queries == case.n
        assert [c.extra for c in by_formula] == [c.extra for c in by_forward]
        for a, b in zip(by_formula, by_forward, strict=True):
            assert a.usage == pytest.approx(b.usage, rel=1e-11)


def test_later_copies_are_added_to_the_strongest_choice() -> None:
    """Greedy by hand: the best second copy beside the best first one, each by a forward pass with masses."""
    case = case_named("biases")
    goal = Displacement(0.3)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), goal)

    def change(extra: list[int]) -> float:
        mass = torch.tensor([1.0 + e for e in extra], dtype=torch.float64)
        moved = case.attention(case.tokens.points, mass / mass.sum()) - problem.clean_output
        return float(torch.linalg.vector_norm(moved)) / goal.tolerance

    extra = [0] * case.n
    for _ in range(3):
        tries = [[e + (i == j) for i, e in enumerate(extra)] for j in range(case.n)]
        extra = max(tries, key=change)
    choices, _ = choose_copies(problem, 3)
    chosen = {choice.extra: choice.usage for choice in choices}
    assert chosen[tuple(extra)] == pytest.approx(change(extra), rel=1e-11)
    assert max(sum(e) for e in chosen) == 3
    assert chosen[tuple(extra)] >= max(choice.usage for choice in choose_copies(problem, 1)[0])


def test_strict_and_tied_copies_differ_under_a_causal_mask() -> None:
    case = case_named("causal")
    parent = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6])
    points = case.tokens.points[parent]
    tied = expand_layer(case.attention, parent, case.n, order="tied")(points)
    strict = expand_layer(case.attention, parent, case.n, order="strict")(points)
    assert_close(tied[2], tied[3], rtol=1e-12)
    assert float((strict[2] - strict[3]).abs().max()) > 1e-3
    # the inserted token behind its parent changes nothing before it
    clean = case.attention(case.tokens.points)
    assert_close(strict[:3], clean[:3], rtol=1e-12)
    assert_close(tied[:2], clean[:2], rtol=1e-12)


@pytest.mark.parametrize("order", ["tied", "strict"])
@pytest.mark.parametrize("name", ["biases", "causal"])
@pytest.mark.one_in(2)
def test_results_are_verified(name: str, order: CausalOrder) -> None:
    case = case_named(name)
    for goal in (Displacement(0.5), Margin(draw(3, 4), pool="mean")):
        for threat in (FrobeniusBall(), PerTokenBall()):
            problem = Problem(case.attention, case.tokens, Copies(2, order, threat), goal)
            result = attack(problem, budget=QUICK)
            assert result.status is Status.FOUND
            assert result.usage >= 1.0
            atoms = result.atoms
            assert atoms is not None
            assert case.n <= atoms.parent.shape[0] <= case.n + 2
            assert result.gain >= 1.0
            size = threat.distance(atoms.displacement(case.tokens))
            assert float(size) == pytest.approx(result.radius, rel=1e-12, abs=1e-300)
            assert result.problem == problem.digest
            assert result.attack == "token-duplication"
            # measured again, by hand
            layer = expand_layer(case.attention, atoms.parent, case.n, order=order)
            output = layer(atoms.points)
            first = torch.cat([torch.tensor([True]), atoms.parent.diff() > 0])
            if isinstance(goal, Displacement):
                used = float(torch.linalg.vector_norm(output[first] - problem.clean_output)) / 0.5
            else:
                pooled = output.mean(dim=0)
                change = -(pooled - problem.resolved.clean) @ problem.resolved.functionals.T
                used = float((change / problem.resolved.violated_at).max())
            assert used == pytest.approx(result.usage, rel=1e-9)


def test_copies_alone_can_violate() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, Copies(1), Displacement(1e-3))
    result = attack(problem, budget=QUICK)
    assert result.radius == 0.0
    assert result.status is Status.FOUND
    assert result.gain == math.inf


def test_fixed_epsilon_and_gain_over_moving() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.5))
    result = attack(replace(problem, threat=Copies(3)), epsilon=0.05, budget=QUICK)
    moving = attack(problem, epsilon=0.05, budget=QUICK)
    assert_at_most(result.radius, 0.05, rtol=1e-12)
    assert result.moving_radius == moving.usage
    assert result.gain > 1.0
    assert result.atoms is not None
    moved = torch.linalg.vector_norm(result.atoms.displacement(case.tokens), dim=1) > 0
    assert bool(moved.all())  # copies move too


def test_the_best_choice_wins() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(2.0))
    found = attack(replace(problem, threat=Copies(2)), budget=QUICK)
    choices, _ = choose_copies(problem, 2)
    work = Work(problems=[problem], epsilon=None, seed=0, budget=QUICK)
    moved = [move_copies(problem, c, order="tied", work=work)[0].point.radius for c in choices]
    assert found.radius == min(moved) < max(moved)


@pytest.mark.parametrize("order", ["tied", "strict"])
def test_what_fewer_copies_choose_is_chosen_with_more(order: CausalOrder) -> None:
    """So that more copies never end in a larger radius; single copies with less effect at rest may move farther."""
    case = case_named("causal" if order == "strict" else "biases")
    for goal in (Displacement(2.0), Margin(draw(3, 4), pool="mean")):
        problem = Problem(case.attention, case.tokens, FrobeniusBall(), goal)
        chosen = [{c.extra for c in choose_copies(problem, k, order=order)[0]} for k in (1, 2, 3)]
        assert chosen[0] < chosen[1] < chosen[2]
    radii = [attack(replace(problem, threat=Copies(k, order)), budget=QUICK).radius for k in (1, 2)]
    assert radii[1] <= radii[0]


def test_copies_that_hurt_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token twice is the same measure, but the moves cost the root of two times as much."""
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.5))
    twice = Choice(extra=(1,) * case.n, usage=0.0)
    work = Work(problems=[problem], epsilon=None, seed=0, budget=QUICK)
    worse = move_copies(problem, twice, order="tied", work=work)[0].point.radius
    monkeypatch.setattr(token_duplication, "choose_copies", lambda *_, **__: ((twice,), 0))
    result = attack(replace(problem, threat=Copies(case.n)), budget=QUICK)
    assert result.radius == result.moving_radius
    assert result.radius < 0.9 * worse
    assert result.atoms is not None
    assert result.atoms.parent.tolist() == list(range(case.n))


def test_only_allowed_tokens_move_but_every_token_is_copied() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, Copies(2, moves=FrobeniusBall(tokens=(1,))), Displacement(0.5))
    result = attack(problem, budget=QUICK)
    assert result.atoms is not None
    moved = result.atoms.displacement(case.tokens).abs().amax(dim=1) > 0
    assert set(result.atoms.parent[moved].tolist()) <= {1}


def test_bad_input_says_what_is_wrong() -> None:
    case = case_named("biases")
    with pytest.raises(InputError, match="copies must be >= 1; got 0"):
        Copies(0)
    with pytest.raises(InputError, match="copies must be >= 1"):
        duplication_effect(case.attention, case.tokens.points, copies=0)
    with pytest.raises(UnsupportedThreatError, match="any-token"):
        Copies(1, moves=AnyToken())
    network = Problem(Network((case.attention,)), TokenMeasure(case.tokens.points), Copies(1), Displacement(0.5))
    with pytest.raises(UnsupportedThreatError, match="Network"):
        attack(network)
