import math
from dataclasses import replace

import torch

from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Margin
from attnrobust.problem import Problem, TokenMap
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close, assert_same_bits, refused
from tests.cases import Case, case_named, cases, goals, problems, telling_cases, threats

CASE = case_named("biases")


def problem(case: Case = CASE) -> Problem:
    return Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))


def test_the_table_has_what_the_tests_count_on() -> None:
    assert len(cases()) >= 30
    assert {case.attention.heads for case in cases()} >= {1, 2, 4, 8, 12}
    assert min(case.n for case in cases()) == 1
    assert max(case.n for case in cases()) == 32
    assert any(case.constant for case in cases())
    assert any(not case.tokens.uniform for case in cases())
    for case in cases():
        assert {type(threat) for threat in threats(case)} == {FrobeniusBall, PerTokenBall, AnyToken}
        assert {type(goal) for goal in goals(case)} == {Displacement, Margin}
    pairs = {(type(p.threat), type(p.goal)) for case in cases() for p in problems(case)}
    assert len(pairs) == 6


def test_the_telling_cases_tell_everything_apart() -> None:
    told = telling_cases()
    assert {case.attention.heads for case in told} >= {1, 2, 12}
    assert {case.attention.causal for case in told} == {case.tokens.uniform for case in told} == {False, True}
    assert (
        {case.attention.mask is None for case in told} == {case.attention.w_o is None for case in told} == {False, True}
    )
    assert {case.attention.b_q is None for case in told} == {case.constant for case in told} == {False, True}
    assert min(case.n for case in told) == 1


def test_a_layer_is_a_token_map() -> None:
    assert isinstance(CASE.attention, TokenMap)


def test_nothing_moved_uses_nothing(case: Case) -> None:
    for one in problems(case):
        # zero up to rounding: a batch of one is evaluated by another kernel than the clean input
        usage = float(one.usage(torch.zeros_like(case.tokens.points)))
        assert abs(usage) <= 1e-10, one.goal.key


def test_usage_is_the_goals_share_at_the_moved_tokens(case: Case) -> None:
    delta = torch.randn(3, *case.tokens.points.shape, dtype=torch.float64)
    for one in problems(case):
        mass = None if case.tokens.uniform else case.tokens.mass
        for row, moved in zip(one.usage(delta), delta, strict=True):
            expected = one.resolved.usage(case.attention(case.tokens.points + moved, mass))
            assert_close(row, expected, rtol=1e-9, atol=1e-12, what=one.goal.key)


def test_masses_reach_the_layer_only_where_they_differ() -> None:
    assert problem().mass is None
    weighted = case_named("masses")
    assert_same_bits(problem(weighted).mass, weighted.tokens.mass)  # type: ignore[arg-type]
    assert_same_bits(problem(weighted).clean_output, weighted.attention(weighted.tokens.points, weighted.tokens.mass))


def test_usage_has_gradients() -> None:
    delta = (1e-2 * torch.randn(*CASE.tokens.points.shape)).double().requires_grad_()
    usage = problem().usage(delta)
    (gradient,) = torch.autograd.grad(usage, delta)
    step = 1e-7 * torch.randn(*delta.shape, dtype=torch.float64)
    with torch.no_grad():
        slope = (problem().usage(delta + step) - problem().usage(delta - step)) / 2
    assert_close(slope, (gradient * step).sum(), rtol=1e-6, what="directional derivative")


def test_refuses_another_width() -> None:
    with refused(InputError, "width 3", "takes 4"):
        Problem(CASE.attention, TokenMeasure(torch.zeros(2, 3)), FrobeniusBall(), Displacement(0.1))


def test_refuses_a_threat_to_a_token_that_is_not_there() -> None:
    with refused(InputError, "token 6", "0 to 5"):
        Problem(CASE.attention, CASE.tokens, FrobeniusBall(tokens=(6,)), Displacement(0.1))


def test_refuses_a_goal_for_a_row_that_is_not_there() -> None:
    with refused(InputError, "row 6", "0 to 5"):
        Problem(CASE.attention, CASE.tokens, FrobeniusBall(), Displacement(0.1, pool=6))


def test_refuses_an_output_that_is_not_finite() -> None:
    huge = replace(CASE.attention, w_v=1e308 * CASE.attention.w_v.sign())
    with refused(InputError, "not finite"):
        Problem(huge, CASE.tokens, FrobeniusBall(), Displacement(0.1))


def test_refuses_scores_that_are_not_finite() -> None:
    huge = replace(CASE.attention, w_q=1e200 * CASE.attention.w_q, w_k=1e200 * CASE.attention.w_k)
    with refused(InputError, "not finite"):
        Problem(huge, CASE.tokens, FrobeniusBall(), Displacement(0.1))


def test_a_goal_that_fails_already_is_told_apart() -> None:
    goal = Margin(torch.eye(CASE.attention.out_width), pool=0)
    label = goal.resolve(problem().clean_output, CASE.tokens.mass).label
    assert label is not None
    wrong = (label + 1) % CASE.attention.out_width
    with refused(AlreadyViolatedError, f"not classified as {wrong}"):
        Problem(CASE.attention, CASE.tokens, FrobeniusBall(), replace(goal, label=wrong))


def test_digest_changes_with_every_part() -> None:
    base = problem()
    other = case_named("key-offset-only-w_q-zero")
    mass = torch.softmax(torch.arange(6.0, dtype=torch.float64), dim=0)
    changed = [
        base,
        replace(base, network=other.attention),
        replace(base, network=replace(CASE.attention, causal=True)),
        replace(base, clean=other.tokens),
        replace(base, clean=TokenMeasure(CASE.tokens.points, mass)),
        replace(base, threat=PerTokenBall()),
        replace(base, threat=FrobeniusBall(tokens=(0,))),
        replace(base, goal=Displacement(0.2)),
        replace(base, goal=Displacement(0.1, pool="mean")),
    ]
    assert len({one.digest for one in changed}) == len(changed)
    assert problem().digest == base.digest


def test_a_copy_resolves_its_goal_anew() -> None:
    base = problem()
    assert float(base.resolved.budgets[0]) == 0.1
    assert math.isclose(float(replace(base, goal=Displacement(0.3)).resolved.budgets[0]), 0.3)
