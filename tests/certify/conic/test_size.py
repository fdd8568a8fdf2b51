"""The size of a program is told before it is built."""

import pytest
import torch

from attnrobust.certify.conic.method import ConicMargin
from attnrobust.certify.conic.size import size_of
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat
from attnrobust.tokens import TokenMeasure
from tests.cases import case_named
from tests.conic_points import assembled, margin_problem

METHOD = ConicMargin()


def test_a_size_it_cannot_finish_is_refused_with_what_it_would_take() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 32, 8, generator=draw) for _ in range(3)]
    layer = Attention(w_q=weights[0], w_k=weights[1], w_v=weights[2])
    tokens = TokenMeasure(torch.randn(24, 32, generator=draw))
    problem = Problem(layer, tokens, FrobeniusBall(), Margin(weight=torch.randn(3, 32, generator=draw)))
    reason = str(METHOD.refuses(problem))
    for word in ("variables", "cones", "moment matrices", "take about", "the limit is 600 s"):
        assert word in reason
    assert METHOD.refuses(replace_threat(problem, FrobeniusBall(tokens=(3,)))) is not None


def replace_threat(problem: Problem, threat: MoveThreat) -> Problem:
    return Problem(problem.network, problem.clean, threat, problem.goal)


def test_the_estimate_matches_what_is_built() -> None:
    for name in ("plain-h1-n5-d4", "plain-h2-n3-d4"):
        problem = margin_problem(case_named(name), FrobeniusBall())
        n, d = problem.clean.points.shape
        heads = 1 if "h1" in name else 2
        size = size_of(heads=heads, keys=[n] * n, moving=n, width=d, programs=1)
        program = assembled(problem, 0.3, bases=size.bases)[0].program
        assert size.blocks == len(program.moments)
        assert size.side == max(block.size for block in program.moments)
        assert size.variables == pytest.approx(program.variables, rel=0.2)
        assert size.cones == pytest.approx(program.cones, rel=0.3)
