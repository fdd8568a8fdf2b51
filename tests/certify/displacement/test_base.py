"""The clean rows of the displacement certificate: functionals, constants, the identity, which rows are separate."""

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement.base import stack_weights
from attnrobust.layers.jacobian import AttentionJacobian
from tests.displacement_tools import (
    SELECTIONS,
    SLACK,
    ExactRows,
    clean_rows,
    floor,
    selected,
    starts,
    worst_ratio,
)


@selected
def test_functionals_and_their_gram(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    unit = torch.eye(rows.clean.points.numel(), dtype=torch.float64).reshape(-1, *rows.clean.points.shape)
    images = ExactRows(rows, unit * rows.moves[:, None]).linear  # (nd, h, n, n)
    gram = torch.einsum("ahij,ahil->hijl", images, images)
    visible = (rows.clean.weight > 0).to(gram)
    visible = visible[..., :, None] * visible[..., None, :]
    scale = float(gram.abs().max()) + floor(rows)
    assert float(((gram - rows.gram) * visible).abs().max()) <= 1e-8 * scale
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt() * (rows.clean.weight > 0)
    assert bool((rows.logit_reach >= norms * (1 - 1e-9) - floor(rows)).all())
    rounding = 2e-6 * float(rows.clean.beta_norm.max() + rows.clean.keys.abs().max() + scale**0.5)
    assert bool(((rows.logit_reach <= norms * (1 + 1e-6) + rounding) | (rows.clean.weight == 0)).all())


@selected
def test_identity_of_the_remainder(name: str, tokens: tuple[int, ...] | None) -> None:
    """Equation 3 with the exact softmax on the left."""
    rows = clean_rows(name, tokens=tokens)
    for radius in (0.05, 0.5):
        exact = ExactRows(rows, starts(rows, radius))
        psi = torch.expm1(exact.u) - exact.u
        partition = 1.0 + (rows.clean.weight * psi).sum(dim=-1, keepdim=True)
        if not bool(torch.isfinite(partition).all()):
            continue
        bilinear = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.q, exact.deviation)
        crossed = torch.einsum("hij,bhij,bhjv->bhiv", rows.clean.weight, exact.u, exact.gamma)
        weighted = rows.clean.weight * psi
        curved = torch.einsum("bhij,hijv->bhiv", weighted, exact.deviation) + weighted @ exact.gamma
        curved = curved - weighted.sum(dim=-1, keepdim=True) * exact.first_order
        formula = (bilinear + crossed + curved) / partition
        error = (formula - exact.remainder).abs().max()
        assert float(error) <= 1e-9 * (1.0 + float(rows.clean.values.abs().max())) * (1.0 + radius)


@selected
def test_row_constants(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)

    def average_ratio(moves: Tensor) -> Tensor:
        change = ExactRows(rows, moves).first_order.norm(dim=-1)
        return (change / (rows.average_reach + floor(rows))).flatten(1).amax(dim=1)

    def first_order_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.linear, exact.deviation).norm(dim=-1)
        return (part / (rows.first_order_reach + floor(rows))).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, average_ratio) <= SLACK
    assert worst_ratio(rows, 1.0, first_order_ratio) <= SLACK
    deviation = rows.clean.values[:, None] - rows.clean.averages[:, :, None]
    squared = torch.einsum("hij,hijv,hiju->hivu", (rows.clean.weight * rows.moves).square(), deviation, deviation)
    exact_reach = torch.linalg.eigvalsh(squared)[..., -1].clamp_min(0.0).sqrt()
    assert bool((rows.value_reach >= exact_reach * (1 - 1e-12)).all())


def test_rows_are_separate_only_where_nothing_cancels() -> None:
    for name, tokens in SELECTIONS:
        for pool in ("all", "mean", 0):
            rows = clean_rows(name, tokens=tokens, pool=pool)
            assert rows.separate == (rows.clean.layer.w_o is None and (pool != "mean" or rows.n == 1))


@pytest.mark.parametrize("pool", ["all", 0])
@pytest.mark.parametrize("name", ["concatenated", "saturated-concatenated-masses"])
def test_shrinking_separate_rows_does_not_raise_the_first_order(name: str, pool: str | int) -> None:
    """Equation 3a: factors in (0, 1] on row-heads, also where the first order is 0."""
    rows = clean_rows(name, pool=pool)
    assert rows.separate
    jacobian = AttentionJacobian(rows.clean.layer, rows.clean.points, rows.clean.mass)
    matrix = jacobian.linear_map(pool=rows.row_weights, token_scale=rows.moves).dense()
    moves = torch.linalg.svd(matrix).Vh.reshape(-1, *rows.clean.points.shape) * rows.moves[:, None]
    exact = ExactRows(rows, moves)
    factors = torch.rand(exact.first_order.shape[:3], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrunk = exact.pooled_norm(rows, factors[..., None] * exact.first_order)
    assert bool((shrunk <= (moves.flatten(1) @ matrix.T).norm(dim=1) * SLACK + floor(rows)).all())


def test_values_behind_the_output_projection() -> None:
    """A stack of head vectors changes the output by at most ``mixing`` times its norm, and exactly what w_o says."""
    rows = clean_rows("plain-h3-n8-d6")
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(rows.clean.points.shape, generator=generator, dtype=torch.float64)
    plain = torch.einsum("nd,hdv->hnv", moves, rows.clean.layer.w_v)
    inner = torch.einsum("nd,hdv->hnv", moves, rows.clean.w_v)
    assert float(rows.clean.layer.combine(plain).norm()) <= rows.clean.mixing * float(inner.norm()) * SLACK
    assert float(stack_weights(rows).sum()) == rows.n
