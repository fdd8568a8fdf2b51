"""Every lemma of the remainder by itself: each bound against ascent on what it bounds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement import remainder as displacement_majorant
from attnrobust.certify.displacement.base import MovingRows
from attnrobust.certify.displacement.remainder import RemainderMajorant
from attnrobust.numerics.exponential import log_psi
from tests.displacement_tools import (
    RADII,
    SLACK,
    ExactRows,
    clean_rows,
    curved_part,
    dense_forms,
    floor,
    form_root,
    moved_values,
    partition_of,
    selected,
    taking_turns,
    two_pools,
    worst_ratio,
)


@selected
@pytest.mark.one_in(2)
def test_reach_of_logits_and_partition(name: str, tokens: tuple[int, ...] | None) -> None:
    rows = clean_rows(name, tokens=tokens)
    majorant = RemainderMajorant(rows)
    for radius in RADII:
        reach = majorant.reach(radius)
        inverse = majorant.inverse_partition(reach, radius)

        def logit_ratio(moves: Tensor, reach: Tensor = reach) -> Tensor:
            visible = (rows.clean.weight > 0).to(reach)
            return (ExactRows(rows, moves).u.abs() * visible / (reach + floor(rows))).flatten(1).amax(dim=1)

        def partition_ratio(moves: Tensor, inverse: Tensor = inverse) -> Tensor:
            u = ExactRows(rows, moves).u.abs().clamp_max(600.0)
            signed = torch.exp(rows.clean.log_weight + log_psi(u)).sum(dim=-1)  # psi(-|u|) <= psi(|u|): a harder test
            exact = (rows.clean.weight * (torch.expm1(ExactRows(rows, moves).u.clamp_max(600.0)))).sum(dim=-1)
            return (torch.minimum(exact, signed) + 1.0).mul(inverse[..., 0]).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, logit_ratio) <= SLACK
        assert worst_ratio(rows, radius, partition_ratio) <= SLACK


@selected
@pytest.mark.parametrize("limit", [0, 128])
@pytest.mark.one_in(2)
def test_diagonal_reach(name: str, tokens: tuple[int, ...] | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches: through the Gram matrices, and in closed form for many tokens."""
    monkeypatch.setattr(displacement_majorant, "GRAM_LIMIT", limit)
    rows = clean_rows(name, tokens=tokens)
    coefficient = rows.clean.weight * rows.clean.spread
    bound = RemainderMajorant(rows).diagonal_reach(coefficient)

    def ratio(moves: Tensor) -> Tensor:
        value = (coefficient * ExactRows(rows, moves).linear.square()).sum(dim=-1)
        return (value / (bound + floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

    assert worst_ratio(rows, 1.0, ratio) <= SLACK


@pytest.mark.parametrize(
    ("name", "tokens", "limit", "pool"),
    taking_turns(((0, "all"), (128, "mean")), ((128, "all"), (0, "mean"))),
)
@pytest.mark.one_in(3)
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
                return size / (roots(moves)[part] + floor(rows))

            assert worst_ratio(rows, radius, ratio, steps=10) <= SLACK


@selected
@pytest.mark.parametrize("limit", [0, 128])
@pytest.mark.one_in(2)
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
            return (change / (paired * exact.u.abs() + floor(rows))).flatten(1).amax(dim=1)

        def crossed_ratio(moves: Tensor, paired: Tensor = paired, crossed: Tensor = crossed) -> Tensor:
            centred = moves[:, None, None] - (rows.clean.weight @ moves[:, None])[:, :, :, None]
            sums = (paired.square() * centred.square().sum(dim=-1)).sum(dim=-1).add(1e-300).sqrt()
            return (sums / (crossed * moves.flatten(1).norm(dim=1)[:, None, None] + 1e-12)).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, weight_ratio, steps=8) <= SLACK
        assert worst_ratio(rows, radius, crossed_ratio, steps=8) <= SLACK


@two_pools
@pytest.mark.one_in(2)
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
        return exact.pooled_norm(rows, sums[..., None]) / (root(moves, quartic) + floor(rows))

    def cubic_ratio(moves: Tensor) -> Tensor:
        exact = ExactRows(rows, moves)
        part = torch.einsum("hij,bhij,bhjv->bhiv", rows.clean.weight, exact.q, exact.gamma)
        return exact.pooled_norm(rows, part) / (root(moves, cubic) + floor(rows))

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
            return (third / (bound + 1e-22 + floor(rows) ** 2)).flatten(1).amax(dim=1)

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
            return (size / (cap + floor(rows))).flatten(1).amax(dim=1)

        assert worst_ratio(rows, radius, ratio) <= SLACK
        total = float(cap.max()) / (float((rows.clean.spread + drift).max()) + floor(rows))
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
            return (value / (closed + floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

        def cumulant_ratio(moves: Tensor, rows: MovingRows = rows, bound: Tensor = cumulant) -> Tensor:
            exact = ExactRows(rows, moves)
            third = torch.einsum("hij,bhij,hijv->bhiv", rows.clean.weight, exact.linear.square(), exact.deviation)
            return (0.5 * third.norm(dim=-1) / (bound + floor(rows) ** 2 + 1e-22)).flatten(1).amax(dim=1)

        assert worst_ratio(rows, 1.0, ratio) <= SLACK
        assert worst_ratio(rows, 1.0, cumulant_ratio) <= SLACK
        general = RemainderMajorant(rows, one_direction=False).diagonal_reach(coefficient)
        outward = 1e-12 * rows.clean.beta_norm.square() * coefficient.sum(dim=-1) + 1e-20  # the padding of ``contrast``
        assert bool((closed <= general * (1 + 1e-9) + outward).all())
        assert bool((closed >= 0.4 * general - 1e-9 * general.max()).all())


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
