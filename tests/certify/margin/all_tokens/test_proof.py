"""The proof holds for whatever a search hands over."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.choice import Choice
from attnrobust.certify.margin.all_tokens.majorant import Parameters, initial_parameters
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.certify.margin.all_tokens.proof import proved_drop
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from tests.margin_problems import evaluation_rounding, random_problem
from tests.stress import Draw, boundary_moves


def spoiled(parameters: Parameters, draw: Draw) -> Parameters:
    """Numbers of any sign and size, some of them not finite."""

    def spoil(value: Tensor) -> Tensor:
        wild = value * 10.0 ** (3.0 * draw.normal(*value.shape)) * draw.normal(*value.shape).sign()
        return torch.where(draw.normal(*value.shape) > 1.5, torch.nan, wild).float()

    return Parameters(**{field.name: spoil(getattr(parameters, field.name)) for field in fields(parameters)})


@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall("linf")])
@pytest.mark.parametrize("seed", range(3))
def test_any_choice_bounds_the_drop(seed: int, threat: MoveThreat) -> None:
    problem, draw = random_problem(7000 + seed, threat), Draw(seed)
    bound = MarginBound(problem, seed=0)
    radius = 0.05 * float(problem.clean.points.norm())
    const = bound.constants_at(radius)
    assert const is not None
    moves = boundary_moves(problem, radius, 200, draw)
    drops = problem.resolved.changes(problem.network(problem.clean.points + moves, problem.mass))
    for index, holder in enumerate(bound.functionals):
        scale = draw.normal(*holder.search.scale.shape)  # also negative
        start = draw.normal(1, *bound.rows.points[bound.rows.index].shape)
        choice = Choice(spoiled(initial_parameters(holder.rows), draw), scale, start / 0.0 if seed else start)
        value = proved_drop(holder.rows, threat, const, choice, chance=bound.chance).value
        assert value >= float(drops[:, index].max()) - float(evaluation_rounding(problem))
