"""The majorant's quadratic form."""

from dataclasses import replace

import pytest
import torch

from attnrobust.certify.margin.all_tokens.constants import constants
from attnrobust.certify.margin.all_tokens.majorant import initial_parameters, majorant, pieces
from attnrobust.certify.margin.all_tokens.method import MarginBound
from attnrobust.threats.moves import FrobeniusBall
from tests.margin_problems import frobenius, random_problem


@pytest.mark.parametrize("seed", range(4))
def test_majorant_is_symmetric_and_tends_to_the_hessian(seed: int) -> None:
    problem = random_problem(400 + seed, FrobeniusBall())
    bound = MarginBound(problem, seed=0)
    functional, x = bound.functionals[0].rows, problem.clean.points
    radius = 1e-6
    const = constants(bound.rows, bound.geometry, frobenius(problem, radius))
    start = initial_parameters(functional)
    small = replace(start, split=1e-1 * start.split, bilinear=1e-3 * start.bilinear)
    form = majorant(functional, const, pieces(functional, const, functional.first_norm), small)
    size = x.numel()
    dense = form.flat(torch.eye(size, dtype=x.dtype))
    # At a saturated row the Hessian vanishes; this is its size at a row that is not.
    reach = torch.linalg.vector_norm(torch.cat([bound.rows.beta, bound.rows.alpha], dim=1), dim=-1).amax(-1)
    unit = float((functional.gamma.norm(dim=-1) * reach).sum())
    torch.testing.assert_close(dense, dense.T, rtol=0.0, atol=1e-9 * float(dense.abs().max()) + 1e-14 * unit)
    drop = lambda y: problem.resolved.changes(problem.network(x + y.reshape(x.shape), problem.mass))[0]  # noqa: E731
    hessian = torch.autograd.functional.hessian(drop, torch.zeros(size, dtype=x.dtype))
    gap = torch.linalg.eigvalsh(dense - hessian)
    scale = float(hessian.abs().max())
    assert float(gap[0]) >= -1e-6 * scale - 1e-13 * unit
    assert float(gap[-1]) <= 2e-2 * scale + 1e-9 * unit
