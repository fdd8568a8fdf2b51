import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Margin, Pool, pool_weights
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked

OUTPUT = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]], dtype=torch.float64)
EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)
MASS = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def moved(*shape: int, seed: int = 0) -> Tensor:
    return OUTPUT + torch.randn(*shape, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- pooling -------------------------------------------------------------------------------------------------------


def test_mean_pool_weighs_by_mass() -> None:
    assert pool_weights("all", MASS) is None
    assert_same_bits(pool_weights("mean", MASS), MASS)  # type: ignore[arg-type]
    assert_same_bits(pool_weights(1, MASS), torch.tensor([0.0, 1.0, 0.0]).double())  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", [3, -1])
def test_refuses_rows_that_do_not_exist(pool: Pool) -> None:
    with refused(InputError, f"row {pool!r}", "0 to 2", "mean"):
        Displacement(1.0, pool=pool).resolve(OUTPUT, MASS)


@pytest.mark.parametrize("pool", [True, "max", 1.0])
def test_refuses_pools(pool: Pool) -> None:
    with shapes_unchecked(), refused(InputError, "pool", repr(pool)):
        Displacement(1.0, pool=pool)


# ---- displacement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf])
def test_refuses_tolerances(tolerance: float) -> None:
    with refused(InputError, "tolerance"):
        Displacement(tolerance)


@pytest.mark.parametrize(
    ("pool", "clean_norm"),
    [("all", math.sqrt(1 + 4 + 9 + 16 + 0.25)), ("mean", math.hypot(1.375, 0.0)), (1, 5.0)],
)
def test_relative_tolerance_is_a_share_of_what_is_pooled(pool: Pool, clean_norm: float) -> None:
    absolute = Displacement(0.1, pool=pool).resolve(OUTPUT, MASS)
    relative = Displacement(0.1, relative=True, pool=pool).resolve(OUTPUT, MASS)
    assert float(absolute.budgets[0]) == 0.1
    assert float(relative.budgets[0]) == pytest.approx(0.1 * clean_norm, rel=1e-15)


def test_relative_tolerance_of_a_zero_output_is_refused() -> None:
    with refused(InputError, "zero", "absolute"):
        Displacement(0.1, relative=True, pool=0).resolve(OUTPUT * torch.tensor([[0.0], [1.0], [1.0]]), MASS)


@pytest.mark.parametrize("pool", ["all", "mean", 2])
def test_displacement_is_the_norm_of_what_is_pooled(pool: Pool) -> None:
    resolved = Displacement(0.3, pool=pool).resolve(OUTPUT, MASS)
    others = moved(2, 4)
    by_hand = torch.empty(2, 4, dtype=torch.float64)
    for a in range(2):
        for b in range(4):
            difference = others[a, b] - OUTPUT
            if pool == "mean":
                difference = MASS @ difference
            elif pool != "all":
                difference = difference[int(pool)]
            by_hand[a, b] = math.sqrt(sum(float(x) ** 2 for x in difference.flatten()))
    assert_close(resolved.changes(others), by_hand[..., None], rtol=1e-14)
    assert_close(resolved.usage(others), by_hand / 0.3, rtol=1e-14)
    assert (resolved.classes, resolved.label, resolved.functionals) == ((), None, None)


def test_the_clean_output_uses_nothing() -> None:
    for goal in (Displacement(0.1), Displacement(0.1, relative=True, pool="mean"), Margin(WEIGHT, pool=0)):
        assert float(goal.resolve(OUTPUT, MASS).usage(OUTPUT)) == 0.0


# ---- margin --------------------------------------------------------------------------------------------------------


def test_margins_by_hand() -> None:
    """Row 1 is (3, -4): logits 3, -4, 1; class 0 leads class 1 by 7 and class 2 by 2."""
    resolved = Margin(WEIGHT, pool=1).resolve(OUTPUT, MASS)
    assert (resolved.label, resolved.classes) == (0, (1, 2))
    assert_same_bits(resolved.budgets, torch.tensor([7.0, 2.0], dtype=torch.float64))
    assert_same_bits(resolved.functionals, WEIGHT[0] - WEIGHT[1:])  # type: ignore[arg-type]


def test_biases_move_the_margins() -> None:
    bias = torch.tensor([0.0, 9.0, 0.5])
    resolved = Margin(WEIGHT, bias, pool=1).resolve(OUTPUT, MASS)
    assert (resolved.label, resolved.classes) == (1, (0, 2))
    assert_same_bits(resolved.budgets, torch.tensor([2.0, 3.5], dtype=torch.float64))


@given(seed=st.integers(0, 1000), pool=st.sampled_from(["mean", 0, 2]), classes=st.integers(2, 5))
def test_the_share_reaches_one_exactly_when_the_label_changes(seed: int, pool: Pool, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    goal = Margin(weight, bias, pool=pool)
    resolved = goal.resolve(OUTPUT, MASS)
    others = OUTPUT + 3 * torch.randn(50, 3, 2, generator=generator, dtype=torch.float64)
    pooled = torch.stack([resolved.pooled(one) for one in others])
    logits = pooled @ weight.T + bias
    assert_same_bits(goal.logits(pooled), logits)
    assert resolved.label is not None
    changed = torch.ne(logits.argmax(dim=-1), resolved.label)
    assert_same_bits(torch.ge(resolved.usage(others), 1.0), changed)


def test_the_named_label_is_the_one_defended() -> None:
    assert Margin(WEIGHT, pool=1, label=0).resolve(OUTPUT, MASS).label == 0
    with refused(AlreadyViolatedError, "not classified as 2", "margin -2", "class 0"):
        Margin(WEIGHT, pool=1, label=2).resolve(OUTPUT, MASS)


def test_a_tie_is_already_violated() -> None:
    tied = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    with refused(AlreadyViolatedError, "margin 0"):
        Margin(tied, pool=0).resolve(OUTPUT, MASS)


def test_mean_pool_margin_weighs_by_mass() -> None:
    logits = (MASS @ OUTPUT) @ WEIGHT.T
    resolved = Margin(WEIGHT).resolve(OUTPUT, MASS)
    assert_close(resolved.budgets, (logits[0] - logits[1:]), rtol=1e-15)


def test_margin_refusals() -> None:
    with shapes_unchecked():
        with refused(InputError, "c >= 2"):
            Margin(WEIGHT[:1])
        with refused(InputError, r"\(c, e\)"):
            Margin(WEIGHT[0])
        with refused(InputError, "bias", r"\(3,\)"):
            Margin(WEIGHT, torch.zeros(2))
    with refused(InputError, "label 3", "0 to 2"):
        Margin(WEIGHT, label=3)
    with refused(InputError, "label -1"):
        Margin(WEIGHT, label=-1)
    with refused(InputError, "mean"):
        Margin(WEIGHT, pool="all")
    with refused(InputError, "readout weight", "NaN"):
        Margin(WEIGHT * math.nan)
    with refused(InputError, "readout bias", "NaN"):
        Margin(WEIGHT, torch.tensor([0.0, 1.0, math.inf]))
    with refused(InputError, "width 3", "gives 2"):
        Margin(torch.eye(3)).resolve(OUTPUT, MASS)


# ---- what is not a number ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_not_finite_uses_no_finite_share(bad: float) -> None:
    broken = OUTPUT.clone()
    broken[2, 1] = bad
    for goal in (Displacement(0.1), Displacement(0.1, pool="mean"), Margin(WEIGHT, pool="mean")):
        assert not math.isfinite(float(goal.resolve(OUTPUT, MASS).usage(broken)))


def test_nan_in_one_class_is_not_hidden_by_the_others() -> None:
    resolved = Margin(WEIGHT, pool=1).resolve(OUTPUT, MASS)
    broken = OUTPUT.clone()
    broken[1, 1] = math.nan
    assert math.isnan(float(resolved.usage(broken)))


# ---- identity ------------------------------------------------------------------------------------------------------


def test_digests_tell_goals_apart() -> None:
    goals = [
        Displacement(0.1),
        Displacement(math.nextafter(0.1, 1)),
        Displacement(0.1, relative=True),
        Displacement(0.1, pool="mean"),
        Displacement(0.1, pool=0),
        Displacement(0.1, pool=1),
        Margin(WEIGHT),
        Margin(WEIGHT, pool=0),
        Margin(WEIGHT, label=0),
        Margin(WEIGHT, torch.zeros(3)),
        Margin(WEIGHT.flip(0)),
    ]
    assert len({goal.digest for goal in goals}) == len(goals)
    assert Margin(WEIGHT.clone()).digest == Margin(WEIGHT).digest


def test_keys_are_readable() -> None:
    assert Displacement(0.01, relative=True).key == "displacement 1%"
    assert Displacement(0.5, pool="mean").key == "displacement 0.5 mean"
    assert Displacement(0.5, pool=0).key == "displacement 0.5 row:0"
    assert Margin(WEIGHT, pool=3, label=1).key == "margin row:3 label:1"
    assert Margin(WEIGHT).key == "margin mean"


def test_later_changes_of_the_readout_do_not_reach_the_goal() -> None:
    weight, bias = WEIGHT.clone(), torch.zeros(3, dtype=torch.float64)
    goal = Margin(weight, bias)
    before = goal.digest
    weight[0, 0] = 7.0
    bias[0] = 1.0
    assert goal.digest == before
