"""Every lemma of the displacement certificate by itself: each bound against ascent on what it bounds."""

import pytest
import torch
from torch import Tensor

from attnrobust.certify import displacement_majorant
from attnrobust.certify.displacement_base import CleanRows, stack_weights
from attnrobust.certify.displacement_majorant import Majorant
from attnrobust.certify.displacement_scalar import log_psi
from attnrobust.layers.attention_jacobian import AttentionJacobian
from tests.displacement_tools import (
    RADII,
    SMALL_CASES,
    ExactRows,
    clean_rows,
    dense_forms,
    form_root,
    joint_product,
    starts,
    worst_ratio,
)

SLACK = 1.0 + 1e-9  # rounding of the measured side only
SELECTIONS = [(name, None) for name in SMALL_CASES] + [("biases", (1,)), ("causal-biases-strong", (0, 4))]
selected = pytest.mark.parametrize(("name", "tokens"), SELECTIONS)


def _floor(rows: CleanRows) -> float:
    """Size of rounding in the measured quantities."""
    return 1e-13 * (1.0 + float(rows.values.abs().max()) + float(rows.keys.abs().max()))


@selected
def test_functionals_and_their_gram(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    unit = torch.eye(rows.points.numel(), dtype=torch.float64).reshape(-1, *rows.points.shape)
    images = ExactRows(rows, unit * rows.moves[:, None]).linear  # (nd, h, n, n)
    gram = torch.einsum("ahij,ahil->hijl", images, images)
    visible = (rows.w > 0).to(gram)
    visible = visible[..., :, None] * visible[..., None, :]
    scale = float(gram.abs().max()) + _floor(rows)
    assert float(((gram - rows.gram) * visible).abs().max()) <= 1e-8 * scale
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt() * (rows.w > 0)
    assert bool((rows.logit_reach >= norms * (1 - 1e-9) - _floor(rows)).all())
    rounding = 2e-6 * float(rows.slope_norms.max() + rows.keys.abs().max() + scale**0.5)
    assert bool(((rows.logit_reach <= norms * (1 + 1e-6) + rounding) | (rows.w == 0)).all())


@selected
@pytest.mark.parametrize("pool", ["all", "mean", 0])
def test_joint_product_is_symmetric_and_exact_in_first_order(
    name: str, tokens: tuple[int, ...] | None, pool: str | int
) -> None:
    """Its first form is |J D|^2 of the Jacobian; the values it reports are those of the forms."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    jacobian = AttentionJacobian(rows.layer, rows.points, rows.mass)
    matrix = jacobian.linear_map(pool=rows.row_weights, token_scale=rows.moves).dense()
    matrices = dense_forms(rows, 0.3)
    exact = matrix.T @ matrix
    assert float((matrices[0] - exact).abs().max()) <= 1e-9 * float(exact.abs().max()) + _floor(rows) ** 2
    product, moves = joint_product(rows), starts(rows, 1.0)
    values = product.apply(moves[0], product.majorant.forms(0.3), torch.ones(4, dtype=torch.float64))[1]
    for form, value in zip(matrices, values, strict=True):
        assert float((form - form.T).abs().max()) <= 1e-9 * float(form.abs().max()) + 1e-22
        assert abs(float(form_root(form, moves[:1])) ** 2 - float(value)) <= 1e-9 * float(form.abs().max()) + 1e-22


@selected
def test_identity_of_the_remainder(name: str, tokens: tuple[int, ...] | None) -> None:
    """Equation 3 with the exact softmax on the left."""
    rows = clean_rows(name, tokens=tokens)
    for radius in (0.05, 0.5):
        exact = ExactRows(rows, starts(rows, radius))
        psi = torch.expm1(exact.u) - exact.u
        partition = 1.0 + (rows.w * psi).sum(dim=-1, keepdim=True)
        if not bool(torch.isfinite(partition).all()):
            continue
        bilinear = torch.einsum("hij,bhij,hijv->bhiv", rows.w, exact.q, exact.deviation)
        crossed = torch.einsum("hij,bhij,bhjv->bhiv", rows.w, exact.u, exact.gamma)
        weighted = rows.w * psi
        curved = torch.einsum("bhij,hijv->bhiv", weighted, exact.deviation) + weighted @ exact.gamma
        curved = curved - weighted.sum(dim=-1, keepdim=True) * exact.first_order
        formula = (bilinear + crossed + curved) / partition
        error = (formula - exact.remainder).abs().max()
        assert float(error) <= 1e-9 * (1.0 + float(rows.values.abs().max())) * (1.0 + radius)


@selected
def test_reach_of_logits_and_partition(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    majorant = Majorant(rows)
    for radius in RADII:
        reach = majorant.reach(radius)
        inverse = majorant._inverse_partition(reach, radius)

        def logit_ratio(moves: Tensor, reach: Tensor = reach) -> Tensor:
            visible = (rows.w > 0).to(reach)
            return (ExactRows(rows, moves).u.abs() * visible / (reach + _floor(rows))).flatten(1).amax(dim=1)

        def partition_ratio(moves: Tensor, inverse: Tensor = inverse) -> Tensor:
            u = ExactRows(rows, moves).u.abs().clamp_max(600.0)
            signed = torch.exp(rows.log_w + log_psi(u)).sum(dim=-1)  # psi(-|u|) <= psi(|u|): a harder test
            exact = (rows.w * (torch.expm1(ExactRows(rows, moves).u.clamp_max(600.0)))).sum(dim=-1)
            return (torch.minimum(exact, signed) + 1.0).mul(inverse[..., 0]).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, logit_ratio) <= SLACK
        assert worst_ratio(rows, radius, partition_ratio) <= SLACK


@selected
def test_row_constants(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)

    def drift_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        change = (exact.gamma[:, :, None] - exact.first_order[:, :, :, None]).norm(dim=-1)
        return (change / (rows.drift + _floor(rows))).flatten(1).amax(dim=1)

    def first_order_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.w, exact.linear, exact.deviation).norm(dim=-1)
        return (part / (rows.first_order_reach + _floor(rows))).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, drift_ratio) <= SLACK
    assert worst_ratio(rows, 1.0, first_order_ratio) <= SLACK
    deviation = rows.values[:, None] - rows.averages[:, :, None]
    squared = torch.einsum("hij,hijv,hiju->hivu", (rows.w * rows.moves).square(), deviation, deviation)
    exact_reach = torch.linalg.eigvalsh(squared)[..., -1].clamp_min(0.0).sqrt()
    assert bool((rows.value_reach >= exact_reach * (1 - 1e-12)).all())


@selected
@pytest.mark.parametrize("limit", [0, 128])
def test_diagonal_reach(name: str, tokens: tuple[int, ...] | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches: through the Gram matrices, and in closed form for many tokens."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens)
    coefficient = rows.w * rows.spread
    bound = Majorant(rows).diagonal_reach(coefficient)

    def ratio(moves: Tensor) -> Tensor:
        value = (coefficient * ExactRows(rows, moves).linear.square()).sum(dim=-1)
        return (value / (bound + _floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, ratio) <= SLACK


@selected
@pytest.mark.parametrize("limit", [0, 128])
@pytest.mark.parametrize("pool", ["all", "mean"])
def test_curved_part_is_inside_its_form(
    name: str, tokens: tuple[int, ...] | None, limit: int, pool: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equations 5, 12-14 and 16: the curved part of every move lies below the logit form and the quartic constant."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens, pool=pool)
    majorant = Majorant(rows)
    for radius in RADII:
        forms = majorant.forms(radius)
        constant = forms.constant - majorant._cubic(radius)
        if not forms.finite:
            continue

        matrix = dense_forms(rows, radius)[1]

        def ratio(moves: Tensor, matrix: Tensor = matrix, radius: float = radius, constant: float = constant) -> Tensor:
            exact = ExactRows(rows, moves)
            u = exact.u.clamp_max(600.0)
            psi = rows.w * torch.where(u.abs() < 1e-3, u.square() * (0.5 + u / 6.0 + u**2 / 24.0), torch.expm1(u) - u)
            share = psi / (1.0 + psi.sum(dim=-1, keepdim=True))
            curved = torch.einsum("bhij,hijv->bhiv", share, exact.deviation) + share @ exact.gamma
            curved = curved - share.sum(dim=-1, keepdim=True) * exact.first_order
            return exact.pooled_norm(rows, curved) / (radius * form_root(matrix, moves) + constant + _floor(rows))

        assert worst_ratio(rows, radius, ratio) <= SLACK


@selected
@pytest.mark.parametrize("pool", ["all", "mean"])
def test_bilinear_parts_are_inside_their_forms(name: str, tokens: tuple[int, ...] | None, pool: str | int) -> None:
    """Equations 15, 17 and 18."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    _, _, value, key = dense_forms(rows, 0.1)
    cubic = Majorant(rows)._cubic(1.0)

    def value_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.w, exact.linear, exact.gamma)
        return exact.pooled_norm(rows, part) / (form_root(value, moves) + _floor(rows))

    def key_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.w, exact.q, exact.deviation)
        return exact.pooled_norm(rows, part) / (form_root(key, moves) + _floor(rows))

    def cubic_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.w, exact.q, exact.gamma)
        return exact.pooled_norm(rows, part) / (cubic + _floor(rows))

    for ratio in (value_ratio, key_ratio, cubic_ratio):
        assert worst_ratio(rows, 1.0, ratio) <= SLACK


def test_values_behind_the_output_projection() -> None:
    """A stack of head vectors changes the output by at most ``mixing`` times its norm, and exactly what w_o says."""
    rows = clean_rows("plain-h3-n8-d6")
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(rows.points.shape, generator=generator, dtype=torch.float64)
    plain = torch.einsum("nd,hdv->hnv", moves, rows.layer.w_v)
    inner = torch.einsum("nd,hdv->hnv", moves, rows.w_v)
    assert float(rows.layer.combine(plain).norm()) <= rows.mixing * float(inner.norm()) * SLACK
    assert float(stack_weights(rows).sum()) == rows.n
