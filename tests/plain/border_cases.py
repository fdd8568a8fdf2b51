"""What users hand in: arrays, lists, scalars of any kind, bare tokens, threats and goals by their spelling."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import refused

POINTS = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)[None]
LAYER = Attention(w_q=EYE, w_k=EYE, w_v=EYE)
PROBLEM = Problem(LAYER, TokenMeasure(POINTS), FrobeniusBall(), Displacement(0.1, relative=True))


def spelled(value: Tensor) -> tuple[Any, ...]:
    return (value, value.numpy(), value.tolist(), tuple(value.tolist()))


@pytest.mark.parametrize("points", spelled(POINTS), ids=lambda p: type(p).__name__)
def test_bare_tokens_of_any_kind_have_equal_masses(points: Any) -> None:
    assert TokenMeasure(points).digest() == TokenMeasure(POINTS).digest()
    assert Problem(LAYER, points, FrobeniusBall(), Displacement(0.1, relative=True)).digest == PROBLEM.digest


@pytest.mark.parametrize("weight", spelled(EYE), ids=lambda w: type(w).__name__)
def test_weights_of_any_kind_make_the_same_layer(weight: Any) -> None:
    mask: Any = np.zeros((4, 4))
    assert Attention(w_q=weight, w_k=weight, w_v=weight, mask=mask).out_width == 2
    assert Attention(w_q=weight, w_k=weight, w_v=weight).digest == LAYER.digest
    assert L2Attention(w_q=weight, w_v=weight, w_o=weight).digest == L2Attention(w_q=EYE, w_v=EYE, w_o=EYE).digest


@pytest.mark.parametrize(("threat", "goal"), [("frobenius", "10%"), ("frobenius", " 10 %"), (FrobeniusBall(), "10%")])
def test_threats_and_goals_by_their_spelling(threat: Any, goal: Any) -> None:
    assert Problem(LAYER, POINTS, threat, goal).digest == PROBLEM.digest  # type: ignore[arg-type]


def test_a_number_is_an_absolute_tolerance() -> None:
    problem = Problem(LAYER, POINTS, "per-token", 0.25)  # type: ignore[arg-type]
    assert problem.goal == Displacement(0.25)
    assert problem.threat == PerTokenBall()


@pytest.mark.parametrize(("threat", "goal"), [("frobenus", "10%"), ("frobenius", "ten"), ("frobenius", None)])
def test_a_spelling_that_means_nothing_is_refused(threat: Any, goal: Any) -> None:
    with refused(InputError):
        Problem(LAYER, POINTS, threat, goal)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tolerance",
    [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5), np.float16(0.5)],
    ids=range(6),
)
def test_scalars_of_any_kind_are_one_tolerance(tolerance: Any) -> None:
    assert Displacement(tolerance).digest == Displacement(0.5).digest
    assert Displacement(np.float32(0.05)).tolerance == float(np.float32(0.05))  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", ["0.5", True, None, [0.5], torch.tensor([0.5, 0.5]), "x"])
def test_what_is_no_number_is_no_tolerance(tolerance: Any) -> None:
    with refused(InputError, "tolerance"):
        Displacement(tolerance)


@pytest.mark.parametrize("index", [1, np.int64(1), torch.tensor(1)])
def test_indices_of_any_integer_kind(index: Any) -> None:
    goals: tuple[tuple[Goal, Goal], ...] = (
        (Displacement(0.5, pool=index), Displacement(0.5, pool=1)),
        (Margin(EYE[0], pool=index, label=index), Margin(EYE[0].numpy(), pool=1, label=1)),  # type: ignore[arg-type]
        (Margin(EYE[0].tolist(), bias=[0.0, 1.0]), Margin(EYE[0], bias=torch.tensor([0.0, 1.0]).double())),  # type: ignore[arg-type]
    )
    assert all(one.digest == other.digest for one, other in goals)


@pytest.mark.parametrize("pool", ["some", 1.5, True, None])
def test_a_pool_that_is_none_is_refused(pool: Any) -> None:
    with refused(InputError, "pool"):
        Displacement(0.5, pool=pool)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_masses_of_a_short_format_are_divided_by_their_sum(kind: type) -> None:
    short: Any = np.full(300, 1.0 / 300.0).astype(kind)
    assert abs(float(short.astype(np.float64).sum()) - 1.0) > 1e-9, "the example is exact"
    measure = TokenMeasure(np.ones((300, 2)), short)  # type: ignore[arg-type]
    exact = short.astype(np.float64) / short.astype(np.float64).sum()
    assert torch.allclose(measure.mass, torch.from_numpy(exact), rtol=1e-14, atol=0.0)


def test_wrong_masses_are_refused_in_every_format() -> None:
    for kind in (np.float32, np.float64):
        with refused(InputError, "sum to 1"):
            TokenMeasure(np.ones((2, 2)), np.array([0.5, 0.501], dtype=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("points", ["text", [[1.0], [1.0, 2.0]], None, 3, [["a"]]])
def test_what_is_no_array_is_no_input(points: Any) -> None:
    with refused(InputError, "tokens"):
        TokenMeasure(points)
