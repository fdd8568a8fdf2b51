"""The joint product of the five forms."""

import pytest
import torch

from attnrobust.layers.jacobian import AttentionJacobian
from tests.displacement_tools import (
    clean_rows,
    dense_forms,
    floor,
    form_root,
    joint_product,
    starts,
    two_pools,
)


@two_pools
@pytest.mark.one_in(3)
def test_joint_product_is_symmetric_and_exact_in_first_order(
    name: str, tokens: tuple[int, ...] | None, pool: str | int
) -> None:
    """Its first form is |J D|^2 of the Jacobian; the values it reports are those of the forms."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    jacobian = AttentionJacobian(rows.clean.layer, rows.clean.points, rows.clean.mass)
    matrix = jacobian.linear_map(pool=rows.row_weights, token_scale=rows.moves).dense()
    matrices = dense_forms(rows, 0.3)
    exact = matrix.T @ matrix
    assert float((matrices[0] - exact).abs().max()) <= 1e-9 * float(exact.abs().max()) + floor(rows) ** 2
    product, moves = joint_product(rows, 0.3), starts(rows, 1.0)
    values = product.apply(moves[0], product.majorant.forms(0.3), torch.ones(5, dtype=torch.float64))[1]
    for form, value in zip(matrices, values, strict=True):
        assert float((form - form.T).abs().max()) <= 1e-9 * float(form.abs().max()) + 1e-22
        assert abs(float(form_root(form, moves[:1])) ** 2 - float(value)) <= 1e-9 * float(form.abs().max()) + 1e-22
