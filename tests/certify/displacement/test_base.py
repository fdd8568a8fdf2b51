"""Every lemma of the displacement certificate by itself: each bound against ascent on what it bounds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement import remainder as displacement_majorant
from attnrobust.certify.displacement.base import MovingRows, stack_weights
from attnrobust.certify.displacement.remainder import RemainderMajorant
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.exponential import log_psi
from tests.displacement_tools import (
    RADII,
    SMALL_CASES,
    ExactRows,
    clean_rows,
    curved_part,
    dense_forms,
    form_root,
    joint_product,
    moved_values,
    partition_of,
    starts,
    worst_ratio,
)

SLACK = 1.0 + 1e-9  # rounding of the measured side only
SELECTIONS = [(name, None) for name in SMALL_CASES] + [("biases", (1,)), ("causal-biases-strong", (0, 4))]
selected = pytest.mark.parametrize(("name", "tokens"), SELECTIONS)


def taking_turns(*pairs: tuple[tuple[object, ...], tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Every selection with two sets of options; the pairs take turns, so that each option meets every kind of row."""
    return [(*selection, *some) for index, selection in enumerate(SELECTIONS) for some in pairs[index % len(pairs)]]


two_pools = pytest.mark.parametrize(
    ("name", "tokens", "pool"),
    taking_turns((("all",), ("mean",)), (("mean",), (0,)), ((0,), ("all",))),
)


def _floor(rows: MovingRows) -> float:
    """Size of rounding in the measured quantities."""
    return 1e-13 * (1.0 + float(rows.clean.values.abs().max()) + float(rows.clean.keys.abs().max()))


@selected
def test_functionals_and_their_gram(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    unit = torch.eye(rows.clean.points.numel(), dtype=torch.float64).reshape(-1, *rows.clean.points.shape)
    images = ExactRows(rows, unit * rows.moves[:, None]).linear  # (nd, h, n, n)
    gram = torch.einsum("ahij,ahil->hijl", images, images)
    visible = (rows.clean.weight > 0).to(gram)
    visible = visible[..., :, None] * visible[..., None, :]
    scale = float(gram.abs().max()) + _floor(rows)
    assert float(((gram - rows.gram) * visible).abs().max()) <= 1e-8 * scale
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt() * (rows.clean.weight > 0)
    assert bool((rows.logit_reach >= norms * (1 - 1e-9) - _floor(rows)).all())
    rounding = 2e-6 * float(rows.clean.beta_norm.max() + rows.clean.keys.abs().max() + scale**0.5)
    assert bool(((rows.logit_reach <= norms * (1 + 1e-6) + rounding) | (rows.clean.weight == 0)).all())


@two_pools
def test_joint_product_is_symmetric_and_exact_in_first_order(
    name: str, tokens: tuple[int, ...] | None, pool: str | int
) -> None:
    """Its first form is |J D|^2 of the Jacobian; the values it reports are those of the forms."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    jacobian = AttentionJacobian(rows.clean.layer, rows.clean.points, rows.clean.mass)
    matrix = jacobian.linear_map(pool=rows.row_weights, token_scale=rows.moves).dense()
    matrices = dense_forms(rows, 0.3)
    exact = matrix.T @ matrix
    assert float((matrices[0] - exact).abs().max()) <= 1e-9 * float(exact.abs().max()) + _floor(rows) ** 2
    product, moves = joint_product(rows, 0.3), starts(rows, 1.0)
    values = product.apply(moves[0], product.majorant.forms(0.3), torch.ones(5, dtype=torch.float64))[1]
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
def test_reach_of_logits_and_partition(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    majorant = RemainderMajorant(rows)
    for radius in RADII:
        reach = majorant.reach(radius)
        inverse = majorant.inverse_partition(reach, radius)

        def logit_ratio(moves: Tensor, reach: Tensor = reach) -> Tensor:
            visible = (rows.clean.weight > 0).to(reach)
            return (ExactRows(rows, moves).u.abs() * visible / (reach + _floor(rows))).flatten(1).amax(dim=1)

        def partition_ratio(moves: Tensor, inverse: Tensor = inverse) -> Tensor:
            u = ExactRows(rows, moves).u.abs().clamp_max(600.0)
            signed = torch.exp(rows.clean.log_weight + log_psi(u)).sum(dim=-1)  # psi(-|u|) <= psi(|u|): a harder test
            exact = (rows.clean.weight * (torch.expm1(ExactRows(rows, moves).u.clamp_max(600.0)))).sum(dim=-1)
            return (torch.minimum(exact, signed) + 1.0).mul(inverse[..., 0]).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, logit_ratio) <= SLACK
        assert worst_ratio(rows, radius, partition_ratio) <= SLACK


@selected
def test_row_constants(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)

    def average_ratio(moves: Tensor) -> Tensor:
        change = ExactRows(rows, moves).first_order.norm(dim=-1)
        return (change / (rows.average_reach + _floor(rows))).flatten(1).amax(dim=1)

    def first_order_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.linear, exact.deviation).norm(dim=-1)
        return (part / (rows.first_order_reach + _floor(rows))).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, average_ratio) <= SLACK
    assert worst_ratio(rows, 1.0, first_order_ratio) <= SLACK
    deviation = rows.clean.values[:, None] - rows.clean.averages[:, :, None]
    squared = torch.einsum("hij,hijv,hiju->hivu", (rows.clean.weight * rows.moves).square(), deviation, deviation)
    exact_reach = torch.linalg.eigvalsh(squared)[..., -1].clamp_min(0.0).sqrt()
    assert bool((rows.value_reach >= exact_reach * (1 - 1e-12)).all())


@selected
@pytest.mark.parametrize("limit", [0, 128])
def test_diagonal_reach(name: str, tokens: tuple[int, ...] | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches: through the Gram matrices, and in closed form for many tokens."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens)
    coefficient = rows.clean.weight * rows.clean.spread
    bound = RemainderMajorant(rows).diagonal_reach(coefficient)

    def ratio(moves: Tensor) -> Tensor:
        value = (coefficient * ExactRows(rows, moves).linear.square()).sum(dim=-1)
        return (value / (bound + _floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, ratio) <= SLACK


@pytest.mark.parametrize(
    ("name", "tokens", "limit", "pool"),
    taking_turns(((0, "all"), (128, "mean")), ((128, "all"), (0, "mean"))),
)
def test_curved_part_is_inside_its_form(
    name: str, tokens: tuple[int, ...] | None, limit: int, pool: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equations 3a, 5, 12-17: the curved part and what the values' change adds, below the sum of their forms."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens, pool=pool)
    majorant = RemainderMajorant(rows)
    for radius in RADII:
        forms = majorant.forms(radius)
        if not forms.finite:
            continue

        _, logit, value, _, query = dense_forms(rows, radius)

        def roots(moves: Tensor, forms: tuple[Tensor, ...] = (logit, value, query), radius: float = radius) -> Tensor:
            curved, paired, bent = (form_root(form, moves) for form in forms)
            return torch.stack([radius * curved + bent, radius * (curved + paired) + bent])

        for part in (0, 1) if limit else (1,):

            def ratio(moves: Tensor, part: int = part, roots: Callable[[Tensor], Tensor] = roots) -> Tensor:
                exact = ExactRows(rows, moves)
                curved, moved = curved_part(rows, exact), moved_values(rows, exact)
                size = exact.pooled_norm(rows, (curved, curved + moved)[part])
                return size / (roots(moves)[part] + _floor(rows))

            assert worst_ratio(rows, radius, ratio, steps=10) <= SLACK


@selected
@pytest.mark.parametrize("limit", [0, 128])
def test_values_weighted_by_grown_weights(
    name: str, tokens: tuple[int, ...] | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 5a pointwise, and the part of it with q (equation 15)."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens)
    majorant = RemainderMajorant(rows)
    for radius in RADII:
        paired = majorant.forms(radius).paired
        crossed = majorant.crossed(paired)

        def weight_ratio(moves: Tensor, paired: Tensor = paired) -> Tensor:
            exact = ExactRows(rows, moves)
            change = (rows.clean.weight * torch.expm1(exact.u.clamp_max(600.0)) / partition_of(rows, exact)[1]).abs()
            return (change / (paired * exact.u.abs() + _floor(rows))).flatten(1).amax(dim=1)

        def crossed_ratio(moves: Tensor, paired: Tensor = paired, crossed: Tensor = crossed) -> Tensor:
            centred = moves[:, None, None] - (rows.clean.weight @ moves[:, None])[:, :, :, None]
            sums = (paired.square() * centred.square().sum(dim=-1)).sum(dim=-1).add(1e-300).sqrt()
            return (sums / (crossed * moves.flatten(1).norm(dim=1)[:, None, None] + 1e-12)).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, weight_ratio, steps=8) <= SLACK
        assert worst_ratio(rows, radius, crossed_ratio, steps=8) <= SLACK


@selected
@pytest.mark.parametrize("pool", ["all", "mean"])
def test_bilinear_parts_are_inside_their_forms(name: str, tokens: tuple[int, ...] | None, pool: str | int) -> None:
    """Equations 17 and 18."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    _, _, value, key, _ = dense_forms(rows, 0.1)

    def value_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.clean.weight, exact.linear, exact.gamma)
        return exact.pooled_norm(rows, part) / (form_root(value, moves) + _floor(rows))

    def key_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.q, exact.deviation)
        return exact.pooled_norm(rows, part) / (form_root(key, moves) + _floor(rows))

    for ratio in (value_ratio, key_ratio):
        assert worst_ratio(rows, 1.0, ratio) <= SLACK


@two_pools
def test_query_form(name: str, tokens: tuple[int, ...] | None, pool: str | int) -> None:
    """Equations 15 and 16, each part by itself: quartic sums and E[q gamma] against ``|A^T delta_i|``."""
    rows = clean_rows(name, tokens=tokens, pool=pool)
    majorant, radius = RemainderMajorant(rows), 0.7
    coefficient = rows.clean.weight * rows.clean.spread
    bent = majorant.quartic_roots(torch.zeros_like(rows.clean.beta_norm), coefficient)
    none = torch.zeros_like(bent[0])
    bilinear = rows.clean.layer.factor * rows.clean.layer.w_q @ rows.clean.layer.w_k.transpose(-1, -2)

    def root(moves: Tensor, weight: Tensor) -> Tensor:
        sizes = torch.einsum("hde,bnd->bhne", bilinear, moves).square().sum(dim=-1)
        return (weight * sizes).flatten(1).sum(dim=1).add(1e-300).sqrt()

    def quartic_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        sums = (coefficient * exact.q.square()).sum(dim=-1)
        return exact.pooled_norm(rows, sums[..., None]) / (root(moves, quartic) + _floor(rows))

    def cubic_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.clean.weight, exact.q, exact.gamma)
        return exact.pooled_norm(rows, part) / (root(moves, cubic) + _floor(rows))

    cubic = majorant.query_weight((none, none), majorant.crossed(rows.clean.weight), radius)
    quartic = majorant.query_weight(bent, none, radius)
    assert worst_ratio(rows, radius, quartic_ratio, steps=12) <= SLACK
    assert worst_ratio(rows, radius, cubic_ratio, steps=12) <= SLACK


@selected
@pytest.mark.parametrize("limit", [0, 128])
def test_bent_sum_by_the_share_of_the_query(
    name: str, tokens: tuple[int, ...] | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation 16 before it is stacked: ``q^T (N + diag(f)) q`` by the query token's share t, for any query vector."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens)
    majorant, coefficient = RemainderMajorant(rows), rows.clean.weight * (rows.clean.spread + 0.1)
    exact = torch.full_like(rows.clean.beta_norm, 1.0 if majorant.small else 0.0)
    first, second = majorant.quartic_roots(exact, coefficient)
    matrix = torch.diag_embed(coefficient) + exact[..., None, None] * majorant.modulus

    def ratio(moves: Tensor) -> Tensor:
        centred = moves[:, None, None] - (rows.clean.weight @ moves[:, None])[:, :, :, None]
        sums = torch.einsum("hijl,bhijd,bhild->bhi", matrix, centred, centred)
        total = moves.flatten(1).square().sum(dim=1)[:, None]
        share = (moves.square().sum(dim=-1) / total).clamp(1e-12, 1.0 - 1e-12)[:, None]
        bound = total[..., None] * (first * share.sqrt() + second * (1.0 - share).sqrt()).square()
        valued = sums * rows.moves / (bound * (1.0 + 1e-5) + 1e-12)  # 1e-5: the clamp of the share
        return valued.flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, ratio) <= SLACK


@selected
def test_split_of_the_curved_part_holds_for_any_slack(name: str, tokens: tuple[int, ...] | None) -> None:
    """``|E[w u^2 vh]| / 2 <= (1 + e) l^T N l + (1 + 1/e) q^T N q`` pointwise: the modulus holds for u, not only l."""
    rows = clean_rows(name, tokens=tokens)
    modulus = RemainderMajorant(rows).modulus

    for slack in (0.05, 3.0):

        def ratio(moves: Tensor, slack: float = slack) -> Tensor:
            exact = ExactRows(rows, moves)
            u = exact.linear + exact.q
            third = 0.5 * torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, u.square(), exact.deviation).norm(
                dim=-1
            )
            forms = [torch.einsum("hijl,bhij,bhil->bhi", modulus, part, part) for part in (exact.linear, exact.q)]
            bound = (1.0 + slack) * forms[0] + (1.0 + 1.0 / slack) * forms[1]
            return (third / (bound + 1e-22 + _floor(rows) ** 2)).flatten(1).amax(dim=1)

        assert worst_ratio(rows, 1.0, ratio, steps=12) <= SLACK


@selected
def test_cap_of_the_curved_part(name: str, tokens: tuple[int, ...] | None) -> None:
    """Equation 13a, where it matters: at large radii."""
    rows = clean_rows(name, tokens=tokens)
    majorant = RemainderMajorant(rows)
    for radius in (1.0, 8.0):
        reach = majorant.reach(radius)
        inverse = majorant.inverse_partition(reach, radius)
        drift = radius * majorant.drift()
        cap = majorant.cap(reach, inverse, rows.clean.spread + drift)

        def ratio(moves: Tensor, cap: Tensor = cap) -> Tensor:
            size = curved_part(rows, ExactRows(rows, moves)).norm(dim=-1)
            return (size / (cap + _floor(rows))).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, ratio) <= SLACK
        total = float(cap.max()) / (float((rows.clean.spread + drift).max()) + _floor(rows))
        assert total <= 1.0 + 1e-6, "shares sum to at most 1"


@pytest.mark.parametrize("name", ["biases", "causal-biases-strong", "saturated", "padding"])
def test_one_moving_token_in_closed_form(name: str) -> None:
    """Equation 13b: rows that are not the token's own see one direction; the general branch bounds the same."""
    for token in (0, 1):
        rows = clean_rows(name, tokens=(token,))
        majorant = RemainderMajorant(rows)
        coefficient = rows.clean.weight * rows.clean.spread
        closed, cumulant = majorant.diagonal_reach(coefficient), majorant.modulus_reach

        def ratio(moves: Tensor, rows: MovingRows = rows, closed: Tensor = closed, f: Tensor = coefficient) -> Tensor:
            value = (f * ExactRows(rows, moves).linear.square()).sum(dim=-1)
            return (value / (closed + _floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

        def cumulant_ratio(moves: Tensor, rows: MovingRows = rows, bound: Tensor = cumulant) -> Tensor:
            exact = ExactRows(rows, moves)
            third = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.linear.square(), exact.deviation)
            return (0.5 * third.norm(dim=-1) / (bound + _floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

        assert worst_ratio(rows, 1.0, ratio) <= SLACK
        assert worst_ratio(rows, 1.0, cumulant_ratio) <= SLACK
        general = RemainderMajorant(rows, one_direction=False).diagonal_reach(coefficient)
        outward = 1e-12 * rows.clean.beta_norm.square() * coefficient.sum(dim=-1) + 1e-20  # the padding of ``contrast``
        assert bool((closed <= general * (1 + 1e-9) + outward).all())
        assert bool((closed >= 0.4 * general - 1e-9 * general.max()).all())


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
    assert bool((shrunk <= (moves.flatten(1) @ matrix.T).norm(dim=1) * SLACK + _floor(rows)).all())


@selected
def test_stack_factors_have_a_limit_at_radius_zero(name: str, tokens: tuple[int, ...] | None) -> None:
    """The cap over the squared radius tends to a constant; a sum P / (1 + P) lost to rounding would make it vanish."""
    majorant = RemainderMajorant(clean_rows(name, tokens=tokens))
    several = (
        majorant.rows.clean.spread.amax(dim=-1) > 1e-6
    )  # where the values are equal only the drift is left: order r
    limit = majorant.forms(1e-5).multiplier * several
    for radius in (1e-9, 1e-11):
        assert bool((majorant.forms(radius).multiplier >= 0.9 * limit).all())


def test_values_behind_the_output_projection() -> None:
    """A stack of head vectors changes the output by at most ``mixing`` times its norm, and exactly what w_o says."""
    rows = clean_rows("plain-h3-n8-d6")
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(rows.clean.points.shape, generator=generator, dtype=torch.float64)
    plain = torch.einsum("nd,hdv->hnv", moves, rows.clean.layer.w_v)
    inner = torch.einsum("nd,hdv->hnv", moves, rows.clean.w_v)
    assert float(rows.clean.layer.combine(plain).norm()) <= rows.clean.mixing * float(inner.norm()) * SLACK
    assert float(stack_weights(rows).sum()) == rows.n
