"""The bilinear parts are inside their forms."""

import pytest
import torch
from torch import Tensor

from tests.displacement_tools import (
    SLACK,
    ExactRows,
    clean_rows,
    dense_forms,
    floor,
    form_root,
    selected,
    worst_ratio,
)


@selected
@pytest.mark.parametrize("pool", ["all", "mean"])
@pytest.mark.one_in(3)
def test_bilinear_parts_are_inside_their_forms(name: str, tokens: tuple[int, ...] | None, pool: str | int) -> None:
    """Equations 17 and 18."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    _, _, value, key, _ = dense_forms(rows, 0.1)

    def value_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.clean.weight, exact.linear, exact.gamma)
        return exact.pooled_norm(rows, part) / (form_root(value, moves) + floor(rows))

    def key_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.q, exact.deviation)
        return exact.pooled_norm(rows, part) / (form_root(key, moves) + floor(rows))

    for ratio in (value_ratio, key_ratio):
        assert worst_ratio(rows, 1.0, ratio) <= SLACK
