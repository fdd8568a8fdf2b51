"""What every goal owes: it holds at the clean input with room, ends where its share is 1, and has one identity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Goal, Margin, Pool, ResolvedGoal, pool_weights
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked
from tests.contracts.questions import draw

N, WIDTH, CLASSES = 4, 3, 3
OUTPUT = draw(N, WIDTH, seed=2)
MASS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WEIGHT = draw(CLASSES, WIDTH, seed=3)
POOLS: dict[type[Goal], tuple[Pool, ...]] = {Displacement: ("all", "mean", 0, N - 1), Margin: ("mean", 0, N - 1)}
BUILD: dict[type[Goal], Callable[[], Goal]] = {
    Displacement: lambda: Displacement(0.1),
    Margin: lambda: Margin(WEIGHT),
}
# Another value of every field; a field that is not here fails the test of the digests.
OTHER: dict[type[Goal], dict[str, Any]] = {
    Displacement: {"tolerance": math.nextafter(0.1, 1.0), "relative": True, "pool": "mean"},
    Margin: {
        "weight": WEIGHT + torch.eye(CLASSES, WIDTH).double() * 1e-15,
        "bias": torch.zeros(CLASSES).double(),
        "pool": 0,
        "label": 1,
    },
}


def public(base: type[Goal] = Goal) -> Iterator[type[Goal]]:
    """Every goal of the package that users can ask for."""
    for kind in base.__subclasses__():
        if kind.__module__.startswith("attnrobust") and not kind.__name__.startswith("_"):
            yield kind
        yield from public(kind)


def examples() -> Iterator[Goal]:
    for kind, pools in POOLS.items():
        for pool in pools:
            yield replace(BUILD[kind](), pool=pool)  # type: ignore[type-var]
    yield Displacement(0.1, relative=True)
    yield Margin(WEIGHT, draw(CLASSES, seed=4))
    yield Margin(WEIGHT, pool=1, label=int((OUTPUT[1] @ WEIGHT.T).argmax()))


every_kind = pytest.mark.parametrize("kind", tuple(BUILD))
every_goal = pytest.mark.parametrize(
    "goal",
    tuple(examples()),
    ids=lambda goal: goal.key + (" biased" if getattr(goal, "bias", None) is not None else ""),
)


def far(resolved: ResolvedGoal, shares: Tensor) -> Tensor:
    """Outputs (b, n, e) that use exactly the given shares of the first budget, or of the nearest class."""
    direction = torch.ones(resolved.clean.shape, dtype=torch.float64)
    if resolved.functionals is not None:
        direction = -resolved.functionals[0]
    if resolved.weights is None:
        step = direction
    else:
        step = resolved.weights[:, None] / resolved.weights.square().sum() * direction  # pools to the direction
    unit = resolved.usage(OUTPUT + step)
    return OUTPUT + (shares / unit)[:, None, None] * step


def test_every_goal_of_the_package_is_asked_here() -> None:
    assert set(public()) == set(BUILD) == set(POOLS) == set(OTHER)


# ---- budgets and shares ----------------------------------------------------------------------------------------------


@every_goal
def test_the_clean_output_has_budgets_and_uses_none_of_them(goal: Goal) -> None:
    resolved = goal.resolve(OUTPUT, MASS)
    assert bool((torch.isfinite(resolved.budgets) & (resolved.budgets > 0)).all())
    assert_same_bits(resolved.changes(OUTPUT), torch.zeros_like(resolved.budgets))
    assert float(resolved.usage(OUTPUT)) == 0.0
    assert_same_bits(resolved.pooled(OUTPUT), resolved.clean)
    assert len(resolved.classes) in {0, len(resolved.budgets)}
    assert (resolved.functionals is None) == (resolved.label is None) == (resolved.classes == ())


@every_goal
def test_the_share_is_one_where_the_goal_ends(goal: Goal) -> None:
    """Outputs at half, just inside, just outside and twice the budget, and the same by the goal's own definition."""
    resolved = goal.resolve(OUTPUT, MASS)
    shares = torch.tensor([0.5, 1.0 - 1e-9, 1.0 + 1e-9, 2.0], dtype=torch.float64)
    outputs = far(resolved, shares)
    assert_close(resolved.usage(outputs), shares, rtol=1e-12)
    assert [violated(goal, output) for output in outputs] == [False, False, True, True]


def violated(goal: Goal, output: Tensor) -> bool:
    """By definition, without a resolved goal."""
    weights = pool_weights(goal.pool, MASS)  # type: ignore[attr-defined]
    here, there = (x if weights is None else weights @ x for x in (OUTPUT, output))
    if isinstance(goal, Displacement):
        allowed = goal.tolerance * (float(torch.linalg.vector_norm(here)) if goal.relative else 1.0)
        return float(torch.linalg.vector_norm(there - here)) >= allowed
    assert isinstance(goal, Margin)
    label = int(goal.logits(here).argmax()) if goal.label is None else goal.label
    return int(goal.logits(there).argmax()) != label


@every_goal
def test_batches_are_outputs_side_by_side_and_gradients_flow(goal: Goal) -> None:
    resolved = goal.resolve(OUTPUT, MASS)
    outputs = (OUTPUT + draw(2, 5, N, WIDTH, seed=7)).requires_grad_()
    usage = resolved.usage(outputs)
    one_by_one = torch.stack([torch.stack([resolved.usage(one) for one in row]) for row in outputs])
    assert_close(usage.detach(), one_by_one.detach(), rtol=1e-13)
    (slope,) = torch.autograd.grad(usage.sum(), outputs)
    assert bool(torch.isfinite(slope).all())
    assert bool((slope.flatten(2).norm(dim=-1) > 0).all())


@every_goal
def test_rounding_of_budgets_covers_outputs_that_are_off(goal: Goal) -> None:
    resolved = goal.resolve(OUTPUT, MASS)
    error = 1e-6 * draw(N, WIDTH, seed=8).abs()
    rounding = goal.budget_rounding(resolved, OUTPUT, resolved.pooled_rounding(OUTPUT, error))
    assert rounding.shape == resolved.budgets.shape
    for seed in range(20):
        off = goal.resolve(OUTPUT + error * draw(N, WIDTH, seed=seed).sign(), MASS)
        assert bool(((off.budgets - resolved.budgets).abs() <= rounding).all())


@every_goal
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_not_finite_uses_no_finite_share(goal: Goal, bad: float) -> None:
    broken = OUTPUT.clone()
    broken[:, 1] = bad
    assert not math.isfinite(float(goal.resolve(OUTPUT, MASS).usage(broken)))


# ---- identity --------------------------------------------------------------------------------------------------------


@every_kind
def test_the_digest_changes_with_every_field(kind: type[Goal]) -> None:
    goal = BUILD[kind]()
    assert {field.name for field in fields(goal)} == set(OTHER[kind])  # type: ignore[arg-type]
    changed = [replace(goal, **{name: value}) for name, value in OTHER[kind].items()]  # type: ignore[type-var]
    digests = [goal.digest, *(other.digest for other in changed)]
    assert len(set(digests)) == len(digests)
    assert BUILD[kind]().digest == goal.digest


def test_goals_of_different_kinds_and_pools_have_different_digests_and_readable_keys() -> None:
    goals = list(examples())
    assert len({goal.digest for goal in goals}) == len(goals)
    for goal in goals:
        assert goal.key.split()[0] == type(goal).__name__.lower()
        assert "\n" not in goal.key


# ---- pools -----------------------------------------------------------------------------------------------------------


@every_kind
def test_pools_read_what_they_name(kind: type[Goal]) -> None:
    """Only the row counts, only the mean by mass counts, or every row does."""
    for pool in POOLS[kind]:
        resolved = replace(BUILD[kind](), pool=pool).resolve(OUTPUT, MASS)  # type: ignore[type-var]
        for row in range(N):
            moved = OUTPUT.clone()
            moved[row] += 1e3 * draw(WIDTH, seed=row)
            used = float(resolved.usage(moved))
            assert (used != 0.0) == (pool in {"all", "mean"} or pool == row), (pool, row)
    hidden = torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    moved = OUTPUT.clone()
    moved[0] += 1e3
    assert float(replace(BUILD[kind](), pool="mean").resolve(OUTPUT, hidden).usage(moved)) == 0.0  # type: ignore[type-var]


@every_kind
@pytest.mark.parametrize("pool", [N, -1, True, "max", "0", 1.0, None])
def test_rows_that_do_not_exist_are_refused_by_name(kind: type[Goal], pool: Any) -> None:
    with shapes_unchecked(), refused(InputError, f"(pool|row).* {pool!r}"):
        replace(BUILD[kind](), pool=pool).resolve(OUTPUT, MASS)  # type: ignore[type-var]


# ---- values that are no values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, -0.1, math.nan, math.inf, -math.inf, 0])
def test_tolerances_that_allow_nothing_or_everything_are_refused(tolerance: float) -> None:
    with shapes_unchecked(), refused(InputError, "tolerance", "positive number"):
        Displacement(tolerance)


@pytest.mark.parametrize("tolerance", [1, np.float64(1.0)])
def test_numbers_of_other_types_are_the_same_tolerance(tolerance: float) -> None:
    with shapes_unchecked():
        resolved = Displacement(tolerance).resolve(OUTPUT, MASS)
    assert_same_bits(resolved.budgets, torch.ones(1, dtype=torch.float64))


@every_kind
def test_a_goal_that_fails_at_the_clean_output_is_refused(kind: type[Goal]) -> None:
    """A margin by its label and by a tie; a displacement is never violated there, but a share of zero is nothing."""
    zero = torch.zeros_like(OUTPUT)
    if kind is Margin:
        worst = int((MASS @ OUTPUT @ WEIGHT.T).argmin())
        with refused(AlreadyViolatedError, f"not classified as {worst}"):
            Margin(WEIGHT, label=worst).resolve(OUTPUT, MASS)
        with refused(AlreadyViolatedError, "margin 0"):
            Margin(WEIGHT).resolve(zero, MASS)
    else:
        with refused(InputError, "zero", "absolute"):
            Displacement(0.1, relative=True).resolve(zero, MASS)
