"""Reference moves: the majorant's value from their linear images is its value from products."""

from dataclasses import replace

import pytest
import torch

from attnrobust.certify.margin.all_tokens.balance import moments, value_at
from attnrobust.certify.margin.all_tokens.constants import constants
from attnrobust.certify.margin.all_tokens.majorant import assembled, coefficients, initial_parameters, pieces
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from attnrobust.threats.moves import FrobeniusBall
from tests.margin_problems import frobenius, random_problem
from tests.stress import Draw, boundary_moves


@pytest.mark.parametrize("tokens", [None, (0,)])
@pytest.mark.parametrize("seed", range(4))
def test_value_at_moves_needs_no_products(seed: int, tokens: tuple[int, ...] | None) -> None:
    problem = random_problem(600 + seed, FrobeniusBall() if tokens is None else FrobeniusBall(tokens=tokens))
    layer = problem.network
    assert isinstance(layer, Attention)
    if seed % 2 and layer.key_width >= 2 and layer.rotary is None:
        problem = replace(problem, network=replace(layer, rotary=Rotary(angles=Draw(1).normal(problem.clean.n, 1))))
    bound, draw = MarginBound(problem, seed=0), Draw(seed)
    functional, radius = bound.functionals[0].rows, 0.1 * float(problem.clean.points.norm())
    const, start = constants(bound.rows, bound.geometry, frobenius(problem, radius)), initial_parameters(functional)
    par = replace(start, reference=draw.normal(*start.reference.shape), value=draw.normal(*start.value.shape))
    found = coefficients(functional, const, pieces(functional, const, functional.first_norm), par)
    moves = boundary_moves(problem, radius, 3, draw)
    direct = assembled(functional, found).at(moves)
    torch.testing.assert_close(value_at(functional, found, moments(functional, moves)), direct, rtol=1e-8, atol=1e-10)
