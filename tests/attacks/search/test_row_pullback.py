"""A few rows of a layer by themselves: against the whole layer and automatic differentiation."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnrobust.attacks.search.evaluate import Evaluator, group_key
from attnrobust.attacks.search.row_pullback import PreparedRows, asked_rows
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close
from tests.modern_layers import modern
from tests.stress import Draw

N, HEADS = 9, 4


def problem(seed: int, pool: int = 3) -> tuple[Problem, Draw]:
    """Four heads, which share their keys in pairs in every other layer."""
    draw = Draw(seed)
    apart = HEADS // 2 if seed % 2 else HEADS
    shared: dict[str, Any] = {}
    for name, shape in {"w_k": (3, 4), "w_v": (3, 4), "b_k": (4,), "b_v": (4,)}.items():
        shared[name] = draw.normal(apart, *shape).repeat_interleave(HEADS // apart, dim=0)
    out = draw.normal(HEADS, 4, 5) if seed % 3 else None
    plain = Attention(draw.normal(HEADS, 3, 4), b_q=draw.normal(HEADS, 4), w_o=out, **shared)
    layer = replace(modern(plain, draw, N), kv_heads=apart)
    return Problem(layer, TokenMeasure(draw.normal(N, 3)), FrobeniusBall(), Displacement(0.1, pool=pool)), draw


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_those_of_the_layer(seed: int) -> None:
    question, draw = problem(seed)
    layer, at = question.network, torch.tensor([3, 7])
    assert isinstance(layer, Attention)
    x, v = draw.normal(2, 3, N, 3), draw.normal(2, 3, N, 3)
    u = draw.normal(2, 3, 2, layer.out_width)
    tape = PreparedRows(layer, N, at).forward(x)
    output, pull = torch.func.vjp(lambda y: layer(y)[..., at, :], x)[:2]
    assert_close(tape.output, output, rtol=1e-12, what="output")
    assert_close(tape.pullback(u), pull(u)[0], rtol=1e-11, what="J^T u")
    assert_close((tape.pushforward(v) * u).sum(), (v * pull(u)[0]).sum(), rtol=1e-11, what="J v")


def test_the_attack_evaluates_the_goals_row_alone() -> None:
    question, draw = problem(1)
    evaluator = Evaluator([question], memory_bytes=1 << 20)
    move = 0.1 * draw.normal(1, 2, N, 3)
    assert isinstance(evaluator.prepared, PreparedRows)
    assert_close(evaluator.usage(move)[0], question.usage(move[0]), rtol=1e-12, what="usage")


def test_other_rows_are_another_group_and_many_rows_are_all() -> None:
    questions = [problem(1, pool)[0] for pool in (3, 4)]
    assert asked_rows(questions[0]) == (3,)
    assert group_key(questions[0]) != group_key(questions[1])
    whole = Problem(questions[0].network, questions[0].clean, FrobeniusBall(), Displacement(0.1, pool="mean"))
    assert asked_rows(whole) is None
