"""The table of Lipschitz bounds: every value is above every value reached, and what does not apply says why."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form import castin2024_smooth as castin2024smooth
from attnrobust.certify.closed_form.castin2024_mean_field import mean_field_constant
from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.derivative_map import derivative_map, largest_row_lower
from attnrobust.lipschitz.table import BoundsTable, Quantity, bounds_table
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import PerTokenBall
from attnrobust.tokens import TokenMeasure

ROUNDING = 1e-9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot_product(seed: int = 0, *, heads: int = 2, causal: bool = False, mask: Tensor | None = None) -> Attention:
    w_q, w_k, w_v = draw(3, heads, 3, 2, seed=seed)
    return Attention(w_q=w_q, w_k=w_k, w_v=w_v, b_q=draw(heads, 2, seed=seed + 1), causal=causal, mask=mask)


def gauss(x: Tensor, y: Tensor) -> Tensor:
    return -(x[..., :, None, :] - y[..., None, :, :]).square().sum(dim=-1)


W = draw(3, 2, 3, 2, seed=7)
PADDING = torch.zeros(4, 4, dtype=torch.float64)
PADDING[:, 3] = -torch.inf
# |x - y| <= 12 on the ball of radius 6, which holds the tokens below: slopes 2 |x - y|
KERNEL = KernelConstants(diameter=12.0, oscillation=144.0, query_slope=24.0, key_slope=24.0)
LAYERS: dict[str, Callable[[], TokenMap]] = {
    "dot-product": dot_product,
    "causal": lambda: dot_product(causal=True),
    "masked": lambda: dot_product(mask=PADDING),
    "one head": lambda: Attention(w_q=W[0, :1], w_k=W[1, :1], w_v=W[2, :1]),
    "L2": lambda: L2Attention(w_q=W[0], w_v=W[2]),
    "cosine": lambda: CosineAttention(w_q=W[0, :1], w_k=W[1, :1], w_v=W[2, :1], eps=0.1),
    "sigmoid": lambda: SigmoidAttention(w_q=W[0], w_k=W[1], w_v=W[2]),
    "LipschitzNorm": lambda: LipschitzNormAttention(w_q=W[0], w_k=W[1], w_v=W[2]),
    "kernel": lambda: KernelAttention(gauss, "gauss", draw(3, 2), KERNEL),
}
APPLIES = {
    "dot-product": {"castin2024-derived", "castin2024-measures-derived", "local-covariances", "displacement"},
    "causal": {"castin2024-derived", "castin2024-measures-causal", "local-covariances", "displacement"},
    "masked": {"castin2024-derived", "local-covariances", "displacement"},
    "one head": {"castin2024-large-radius", "castin2024-reported", "singla2020-curvature"},
    "L2": {"kim2021-l2", "kim2021-l2-reported", "singular-value"},
    "cosine": {"cosine-lipschitz", "cosine-reported-nair", "cosine-reported-lipsformer", "singular-value"},
    "sigmoid": {"sigmoid-ball", "sigmoid-measures", "singular-value"},
    "LipschitzNorm": {"dasoulas2021-lipschitznorm", "dasoulas2021-joint-reported", "singular-value"},
    "kernel": {"vuckovic2020-kernel", "vuckovic2020-misspecified", "singular-value"},
}


@pytest.fixture(scope="module", params=LAYERS)
def table(request: pytest.FixtureRequest) -> tuple[str, BoundsTable]:
    return request.param, bounds_table(LAYERS[request.param](), TokenMeasure(draw(4, 3, seed=3)), search=0)


def test_no_bound_is_below_a_value_that_is_reached(table: tuple[str, BoundsTable]) -> None:
    for row in table[1].bounds:
        assert row.ratio is None or row.ratio >= 1.0 - ROUNDING, row
        lower = table[1].best_lower(row.quantity)
        assert (row.ratio is None) == (lower is None or lower.value == 0 or row.value == float("inf"))


def test_what_applies_is_there_and_the_rest_says_why(table: tuple[str, BoundsTable]) -> None:
    kind, result = table
    names = {row.name for row in result.bounds}
    assert names >= APPLIES[kind]
    assert all(entry.reason for entry in result.skipped)
    foreign = set().union(*(APPLIES[other] for other in ("L2", "cosine", "sigmoid", "LipschitzNorm") if other != kind))
    mentioned = names | {entry.method for entry in result.skipped}
    assert mentioned >= foreign


def test_rows_say_region_condition_kind_and_reference(table: tuple[str, BoundsTable]) -> None:
    for row in table[1].bounds:
        assert row.region
        assert row.conditions
        assert row.reference
        assert (row.failure_probability > 0) == (row.kind == "probabilistic")
    assert {row.quantity for row in table[1].lower_bounds} <= {row.quantity for row in table[1].bounds}


def test_values_are_those_of_the_bounds_themselves() -> None:
    layer = dot_product()
    result = bounds_table(layer, n=5, radius=0.7, search=0)
    values = {(row.quantity, row.name): row.value for row in result.bounds}
    assert values[Quantity.BALL, "castin2024-derived"] == ball_constant(layer, 5, 0.7).value
    assert values[Quantity.W2, "castin2024-measures-derived"] == mean_field_constant(layer, 0.7, order=2.0).value
    reasons = {entry.method: entry.reason for entry in result.skipped}
    assert "needs an input" in reasons["local-covariances"]
    assert "needs an input" in reasons["displacement"]


def test_a_wrong_bound_shows_as_a_ratio_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(castin2024smooth, "ball_constant", lambda *_, **__: Upper(0.01))
    result = bounds_table(dot_product(), n=3, radius=1.0, search=0)
    assert min(row.ratio for row in result.bounds if row.ratio is not None) < 1.0


@pytest.mark.parametrize("kind", ["L2", "cosine", "LipschitzNorm"])
def test_constants_of_all_of_space_do_not_depend_on_the_ball(kind: str) -> None:
    layer = LAYERS[kind]()
    small, large = (bounds_table(layer, n=4, radius=radius, search=0) for radius in (0.1, 50.0))
    measures = (Quantity.W1, Quantity.W2, Quantity.W_INF, Quantity.CONTEXT)  # on the ball only
    for first, second in zip(small.bounds, large.bounds, strict=True):
        if first.quantity in measures:
            continue
        assert first.value == pytest.approx(second.value, rel=1e-12)


def test_the_global_constant_of_l2_attention_is_its_formula() -> None:
    layer = LAYERS["L2"]()
    assert isinstance(layer, L2Attention)
    n = 4
    spread = 1.0
    for _ in range(200):  # c e^(c+1) = n - 1 by iteration
        spread = 0.5 * (spread + (n - 1) / np.exp(spread + 1.0))
    inner = layer.factor**0.5 * torch.linalg.matrix_norm(layer.w_q, 2)
    outer = torch.linalg.matrix_norm(layer.factor**0.5 * layer.w_q.mT @ layer.w_v, 2)
    bracket = n**0.5 * (1 + 2 * spread) + 2 * spread
    expected = bracket * float(torch.linalg.vector_norm(inner * outer))  # heads are concatenated
    values = {(row.quantity, row.name): row.value for row in bounds_table(layer, n=n, radius=1.0, search=0).bounds}
    assert values[Quantity.BALL, "kim2021-l2"] == pytest.approx(expected, rel=1e-6)


def test_the_row_search_is_below_and_near_the_truth() -> None:
    layer, points = dot_product(), draw(3, 3, seed=5)
    linear = derivative_map(layer, TokenMeasure(points))
    blocks = linear.dense().reshape(3, 4, 3, 3)
    angles = torch.nn.functional.normalize(draw(20000, 4, seed=6), dim=-1)  # directions of the output row
    truth = float(torch.linalg.vector_norm(torch.einsum("ie...,ue->ui...", blocks, angles), dim=-1).sum(-1).max())
    assert 0.99 * truth <= largest_row_lower(linear).value <= truth * 1.05


@pytest.mark.parametrize("kind", ["L2", "kernel", "sigmoid"])
def test_automatic_derivatives_are_exact(kind: str) -> None:
    layer, points = LAYERS[kind](), draw(4, 3, seed=3)
    full = torch.func.jacrev(layer)(points).flatten(2).flatten(0, 1)
    torch.testing.assert_close(derivative_map(layer, TokenMeasure(points)).dense(), full, rtol=1e-12, atol=1e-12)


def test_unequal_masses_have_their_own_local_rows() -> None:
    mass = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    result = bounds_table(dot_product(), TokenMeasure(draw(3, 3), mass), threat=PerTokenBall(), search=0)
    names = [row.name for row in result.bounds if row.quantity == Quantity.LOCAL_MASS]
    assert names == ["singular-value", "local-covariances"]
    assert all(row.ratio is None or row.ratio >= 1.0 - ROUNDING for row in result.bounds)


@pytest.mark.parametrize(
    "kind", ["sigmoid", *(pytest.param(k, marks=pytest.mark.slow) for k in LAYERS if k not in ("sigmoid", "kernel"))]
)
def test_the_ascent_only_raises_lower_bounds_and_none_passes_its_bound(kind: str) -> None:
    steps = 20 if kind == "sigmoid" else 60
    plain, searched = (bounds_table(LAYERS[kind](), n=2, radius=1.5, search=count) for count in (0, steps))
    assert any(row.name == "ascent" for row in searched.lower_bounds)
    for first, second in zip(plain.bounds, searched.bounds, strict=True):
        assert first.value == second.value
        if first.ratio is not None and second.ratio is not None:
            assert 1.0 - ROUNDING <= second.ratio <= first.ratio


def test_a_layer_of_another_kind_is_told_why_nothing_applies() -> None:
    layer = Mlp(draw(3, 4), draw(4, 3), activation="relu")
    result = bounds_table(layer, TokenMeasure(draw(3, 3)), search=0)
    assert {row.name for row in result.bounds} == {"singular-value"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give an input"),
        ({"n": 3}, "give an input"),
        ({"n": 0, "radius": 1.0}, ">= 1"),
        ({"n": 3, "radius": 0.0}, "radius must be a positive number"),
        ({"n": 3, "radius": float("nan")}, "radius must be a positive number"),
        ({"n": 3, "radius": 1.0, "epsilon": 0.1}, "distance from an input"),
        ({"clean": TokenMeasure(draw(3, 3)), "n": 4}, "3 tokens"),
        ({"clean": TokenMeasure(draw(3, 2))}, "width 2"),
        ({"clean": TokenMeasure(torch.zeros(3, 3))}, "radius 0"),
        ({"clean": TokenMeasure(draw(3, 3)), "epsilon": -1.0}, "epsilon must be a positive number"),
        ({"n": 3, "radius": 1.0, "search": -1}, "must be >= 0; got -1"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bounds_table(dot_product(), **options)  # type: ignore[arg-type]


def test_far_out_a_finite_mask_does_not_choose_the_key() -> None:
    generator = torch.Generator().manual_seed(1)
    w_q, w_k, w_v = (torch.randn(1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(3, 3)
    mask[:, 0] = 300.0  # at X every query sees the first key alone
    points = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    table = bounds_table(Attention(w_q, w_k, w_v, mask=mask), TokenMeasure(points), search=0)
    limits = [row.value for row in table.lower_bounds if row.quantity is Quantity.LIMIT]
    uppers = [row.value for row in table.bounds if row.quantity is Quantity.LIMIT]
    assert uppers
    assert all(low <= up * (1.0 + ROUNDING) for low in limits for up in uppers)
