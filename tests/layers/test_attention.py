import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Rotary
from tests import reference
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked
from tests.cases import Case, case_named


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**changes: Any) -> Attention:
    """Two heads, d = 4, k = 3, v = 2, e = 5, all biases."""
    given: dict[str, Any] = {
        "w_q": random(2, 4, 3, seed=1),
        "w_k": random(2, 4, 3, seed=2),
        "w_v": random(2, 4, 2, seed=3),
        "b_q": random(2, 3, seed=4),
        "b_k": random(2, 3, seed=5),
        "b_v": random(2, 2, seed=6),
        "w_o": random(2, 2, 5, seed=7),
        "b_o": random(5, seed=8),
    }
    return Attention(**(given | changes))


def masses(case: Case) -> Tensor | None:
    return None if case.tokens.uniform else case.tokens.mass


# ---- against the slow reference ------------------------------------------------------------------------------------


def test_output_is_the_reference(every_case: Case) -> None:
    layer, points, mass = every_case.attention, every_case.tokens.points, masses(every_case)
    given = None if mass is None else mass.numpy()
    expected = torch.from_numpy(reference.attention(points.numpy(), **reference.arguments(layer), mass=given))
    # 1e-12: at most 32 terms a sum and scores up to a few hundred, whose rounding the exponential multiplies by itself
    assert_close(layer(points, mass), expected, rtol=1e-12, what="output")


def test_weights_are_the_reference(case: Case) -> None:
    mass = masses(case)
    arguments = reference.arguments(case.attention)
    scores = {name: arguments[name] for name in ("w_q", "w_k", "b_q", "b_k", "scale", "mask", "causal")}
    expected = reference.attention_weights(
        case.tokens.points.numpy(), **scores, mass=None if mass is None else mass.numpy()
    )
    actual = case.attention.weights(case.tokens.points, mass)
    assert_close(actual, torch.from_numpy(expected), rtol=1e-12, what="weights")
    assert_close(actual.sum(dim=-1), torch.ones(actual.shape[:-1], dtype=torch.float64), rtol=1e-14, what="row sums")


def test_equal_masses_cancel(case: Case) -> None:
    equal = torch.full((case.n,), 1 / case.n, dtype=torch.float64)
    points = case.tokens.points
    assert_close(case.attention(points, equal), case.attention(points), rtol=1e-12, what="equal masses")


def test_derived_weights_give_the_scores(case: Case) -> None:
    """x_i B x_j^T + c . x_j differs from the score by a constant of the row, which the softmax does not see."""
    attention, points = case.attention, case.tokens.points
    short = points @ attention.bilinear @ points.T + (attention.key_offset @ points.T)[:, None, :]
    bias = attention.score_bias(case.n)
    probability = torch.softmax(short if bias is None else short + bias, dim=-1)
    # the dropped terms reach 1e3 where tokens are long; their rounding is what remains
    assert_close(probability, attention.weights(points), rtol=1e-10, what="weights of the short form")


def test_value_output_gives_the_output(case: Case) -> None:
    attention, points = case.attention, case.tokens.points
    weights = attention.weights(points)
    without_biases = replace(attention, b_v=None, b_o=None)
    direct = torch.einsum("hij,jd,hde->ie", weights, points, attention.value_output)
    assert_close(direct, without_biases(points), rtol=1e-12, what="output through value_output")


def test_batches_agree_with_single_inputs(case: Case) -> None:
    points = case.tokens.points + torch.stack(
        [torch.zeros(case.n, case.tokens.width), random(case.n, case.tokens.width)]
    )
    mass = masses(case)
    together = case.attention(points, mass)
    for one, row in zip(points, together, strict=True):
        assert_close(row, case.attention(one, mass), rtol=1e-13, what="row of a batch")


def test_masses_may_differ_within_a_batch() -> None:
    attention, points = layer(), random(2, 3, 4)
    mass = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    together = attention(points, mass)
    for b in range(2):
        assert_close(together[b], attention(points[b], mass[b]), rtol=1e-14)


def test_autograd_goes_through() -> None:
    points = random(3, 4).requires_grad_()
    expected = reference.jacobian(
        lambda x: reference.attention(x, **reference.arguments(layer())), points.detach().numpy()
    )
    actual = torch.func.jacrev(layer())(points)
    assert_close(actual.detach(), torch.from_numpy(expected), rtol=1e-12, what="Jacobian")


# ---- exact answers -------------------------------------------------------------------------------------------------


def test_one_token_is_affine() -> None:
    attention, point = layer(), random(1, 4)
    first, second = ((point @ attention.w_v[h] + attention.b_v[h]) @ attention.w_o[h] for h in range(2))
    assert_close(attention(point), first + second + attention.b_o, rtol=1e-14)


@given(n=st.integers(1, 9), seed=st.integers(0, 1000))
def test_zero_queries_average_by_mass(n: int, seed: int) -> None:
    attention = layer(w_q=torch.zeros(2, 4, 3), b_q=None)
    points, mass = random(n, 4, seed=seed), torch.softmax(random(n, seed=seed + 1), dim=0)
    mean = mass @ points
    expected = torch.einsum("d,hde->e", mean, attention.w_v @ attention.w_o)
    expected = expected + torch.einsum("hv,hve->e", attention.b_v, attention.w_o) + attention.b_o
    assert_close(attention(points, mass), expected.expand(n, 5), rtol=1e-12)


@given(n=st.integers(1, 6), repeated=st.integers(0, 5), seed=st.integers(0, 1000))
def test_a_repeated_token_is_its_mass_added(n: int, repeated: int, seed: int) -> None:
    """The output rows of the distinct tokens are the same, whether a token stands twice or has twice the mass."""
    repeated %= n
    points, mass = random(n, 4, seed=seed), torch.softmax(random(n, seed=seed + 1), dim=0)
    split = torch.cat([mass, mass[repeated : repeated + 1] / 3])
    split[repeated] *= 2 / 3
    longer = torch.cat([points, points[repeated : repeated + 1]])
    assert_close(layer()(longer, split)[:n], layer()(points, mass), rtol=1e-12, what="duplicated token")
    assert_close(layer()(longer, split)[n], layer()(points, mass)[repeated], rtol=1e-12, what="the copy's own row")


@given(n=st.integers(1, 8), seed=st.integers(0, 1000))
def test_permuting_tokens_permutes_rows(n: int, seed: int) -> None:
    points, mass = random(n, 4, seed=seed), torch.softmax(random(n, seed=seed + 1), dim=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(layer()(points[order], mass[order]), layer()(points, mass)[order], rtol=1e-12)


def test_permuting_tokens_with_their_mask_permutes_rows() -> None:
    mask, points, order = random(5, 5, seed=9), random(5, 4), torch.tensor([3, 0, 4, 1, 2])
    moved = layer(mask=mask[order][:, order])
    assert_close(moved(points[order]), layer(mask=mask)(points)[order], rtol=1e-12)


def test_causal_first_token_sees_itself_only() -> None:
    attention, points = layer(causal=True), random(6, 4)
    assert_close(attention(points)[0], layer()(points[:1])[0], rtol=1e-13)


def test_causal_rows_do_not_see_the_future() -> None:
    attention, points = layer(causal=True), random(6, 4)
    assert_close(attention(points)[:4], attention(points[:4]), rtol=1e-13)
    assert_same_bits(attention(points + 100 * torch.eye(6, 4).flip(0))[:2], attention(points)[:2], what="first rows")


def test_causal_is_a_mask() -> None:
    future = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    assert_same_bits(layer(causal=True)(random(6, 4)), layer(mask=future)(random(6, 4)))


def test_hidden_keys_count_for_nothing() -> None:
    mask = torch.zeros(6, 6)
    mask[:, 4:] = -math.inf
    points = random(6, 4)
    assert_close(layer(mask=mask)(points)[:4], layer()(points[:4]), rtol=1e-13, what="padded")
    moved = points.clone()
    moved[4:] *= 1e3
    assert_same_bits(layer(mask=mask)(moved)[:4], layer(mask=mask)(points)[:4], what="after the padding moved")


def test_adding_a_constant_to_a_mask_row_changes_nothing() -> None:
    mask = random(5, 5)
    shifted = mask + random(5, 1, seed=3)
    assert_close(layer(mask=shifted)(random(5, 4)), layer(mask=mask)(random(5, 4)), rtol=1e-13)


def test_key_bias_cancels_in_the_softmax() -> None:
    assert_close(layer(b_k=None)(random(5, 4)), layer()(random(5, 4)), rtol=1e-12)


def test_concatenated_heads_are_a_block_projection() -> None:
    plain = layer(w_o=None, b_o=None)
    blocks = torch.zeros(2, 2, 4)
    blocks[0, :, :2] = torch.eye(2)
    blocks[1, :, 2:] = torch.eye(2)
    assert plain.out_width == 4
    assert_close(plain(random(5, 4)), layer(w_o=blocks, b_o=None)(random(5, 4)), rtol=1e-14)
    assert_same_bits(plain.value_output, plain.w_v @ blocks.double(), what="value_output")


def test_values_scale_the_output() -> None:
    plain = layer(b_o=None)
    assert_close(
        layer(w_v=3 * plain.w_v, b_v=3 * plain.b_v, b_o=None)(random(5, 4)), 3 * plain(random(5, 4)), rtol=1e-13
    )


def test_scale_moves_into_the_queries() -> None:
    own = layer(scale=0.7)
    assert_close(layer(w_q=0.7 * own.w_q, b_q=0.7 * own.b_q, scale=1.0)(random(5, 4)), own(random(5, 4)), rtol=1e-13)


def test_default_scale_is_one_over_root_key_width() -> None:
    assert layer().factor == 1 / math.sqrt(3)
    assert_same_bits(layer(scale=1 / math.sqrt(3))(random(5, 4)), layer()(random(5, 4)))


def test_two_tokens_by_hand() -> None:
    """One head, d = k = v = 1, all weights 1: f_i = sum_j exp(x_i x_j) x_j / sum_j exp(x_i x_j)."""
    one = torch.ones(1, 1, 1)
    x, y = 0.5, -1.25
    rows = [(math.exp(t * x) * x + math.exp(t * y) * y) / (math.exp(t * x) + math.exp(t * y)) for t in (x, y)]
    actual = Attention(w_q=one, w_k=one, w_v=one)(torch.tensor([[x], [y]], dtype=torch.float64))
    assert_close(actual, torch.tensor(rows, dtype=torch.float64)[:, None], rtol=1e-15)


def test_scores_of_ten_thousand_do_not_overflow() -> None:
    attention = case_named("saturated").attention
    strong = replace(attention, w_q=1e4 * attention.w_q)
    assert bool(torch.isfinite(strong(random(6, 4))).all())


# ---- sizes and identity --------------------------------------------------------------------------------------------


def test_sizes() -> None:
    attention = layer()
    sizes = (attention.heads, attention.width, attention.key_width, attention.value_width, attention.out_width)
    assert sizes == (2, 4, 3, 2, 5)
    assert attention.device == torch.device("cpu")


def test_weights_are_read_in_float64() -> None:
    single = layer(w_q=random(2, 4, 3).float(), mask=torch.zeros(3, 3))
    assert single.w_q.dtype == torch.float64
    assert single.mask is not None
    assert single.mask.dtype == torch.float64
    assert single(random(3, 4)).dtype == torch.float64


def test_later_training_does_not_reach_the_layer() -> None:
    """A model in float64 hands over its own storage; a step of its optimiser must not change a digested layer."""
    w_q, w_k, w_v, mask = random(2, 4, 3), random(2, 4, 3, seed=1), random(2, 4, 3, seed=2), random(3, 3)
    attention = Attention(w_q=w_q, w_k=w_k, w_v=w_v, mask=mask)
    before = attention(random(3, 4)).clone()
    for tensor in (w_q, w_k, w_v, mask):
        tensor.mul_(2.0)
    assert_same_bits(attention(random(3, 4)), before)


def test_digest_changes_with_every_field() -> None:
    base = layer(mask=random(3, 3))
    changed: dict[str, Any] = {
        "scale": 0.5, "causal": True, "window_left": 1, "window_right": 1, "rotary": Rotary(random(1)),
        "head_bias": HeadBias(slopes=random(2)),
    }  # fmt: skip
    for field in fields(Attention):
        value = getattr(base, field.name)
        if isinstance(value, Tensor):
            value = value.clone()
            value.view(-1)[-1] = torch.nextafter(value.view(-1)[-1], torch.tensor(math.inf, dtype=torch.float64))
            changed[field.name] = value
    assert set(changed) == {field.name for field in fields(Attention)} - {"kv_heads"}, (
        "a new field: is it in the digest?"
    )
    digests = {name: replace(base, **{name: value}).digest for name, value in changed.items()}
    nothing: list[dict[str, Any]] = [{name: None} for name in ("b_q", "b_k", "b_v", "b_o", "mask")]
    absent = {f"without {absence}": replace(base, **absence).digest for absence in nothing}
    everything = {"base": base.digest} | digests | absent
    assert len(set(everything.values())) == len(everything), everything


def test_digest_is_of_the_content() -> None:
    assert layer().digest == layer().digest
    assert layer(scale=1 / math.sqrt(3)).digest == layer().digest
    assert layer(causal=True).digest != layer(mask=torch.full((3, 3), -math.inf).triu(1)).digest


def test_changed_copies() -> None:
    mask = random(3, 3)
    masked = replace(layer(), mask=mask)
    assert masked.mask is not None
    assert_same_bits(masked.mask, mask)
    assert replace(masked, mask=None).digest == layer().digest
    assert layer(mask=mask).to("cpu").digest == layer(mask=mask).digest


def test_a_copy_forgets_what_was_derived() -> None:
    attention = layer()
    _ = attention.bilinear, attention.digest
    doubled = replace(attention, w_q=2 * attention.w_q)
    assert doubled.digest != attention.digest
    assert_close(doubled.bilinear, 2 * attention.bilinear, rtol=1e-15)


@pytest.mark.gpu
def test_moves_to_a_gpu() -> None:
    moved = layer(mask=random(3, 3)).to("cuda")
    assert moved.device.type == "cuda"
    assert_close(moved(random(3, 4).cuda()).cpu(), layer(mask=random(3, 3))(random(3, 4)), rtol=1e-12)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "w_o", "b_o"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_weights_that_are_not_finite(name: str, bad: float) -> None:
    value = getattr(layer(), name).clone()
    value.view(-1)[0] = bad
    with refused(InputError, name, "1 NaN or infinite"):
        layer(**{name: value})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("w_q", (4, 3)),
        ("w_q", (2, 4, 5)),
        ("w_k", (2, 5, 3)),
        ("w_k", (3, 4, 3)),
        ("w_v", (2, 5, 2)),
        ("b_q", (2, 2)),
        ("b_k", (6,)),
        ("b_v", (2, 3)),
        ("w_o", (4, 5)),
        ("w_o", (2, 3, 5)),
        ("b_o", (4,)),
    ],
)
def test_refuses_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    with shapes_unchecked(), refused(InputError, r"must have (shape|\d dimensions)"):
        layer(**{name: random(*shape)})


def test_refuses_empty_dimensions() -> None:
    with refused(InputError, ">= 1"):
        Attention(w_q=torch.zeros(1, 4, 0), w_k=torch.zeros(1, 4, 0), w_v=torch.zeros(1, 4, 1))


def test_refuses_integer_weights() -> None:
    with shapes_unchecked(), refused(InputError, "w_v", "int64"):
        layer(w_v=torch.ones(2, 4, 2, dtype=torch.int64))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_refuses_a_scale_that_is_not_finite(scale: float) -> None:
    with refused(InputError, "scale"):
        layer(scale=scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_mask_entries(bad: float) -> None:
    mask = torch.zeros(3, 3)
    mask[1, 2] = bad
    with refused(InputError, "mask"):
        layer(mask=mask)


def test_refuses_a_boolean_mask() -> None:
    with shapes_unchecked(), refused(InputError, "mask", "bool", "additive"):
        layer(mask=torch.ones(3, 3, dtype=torch.bool))


def test_refuses_a_row_that_sees_nothing() -> None:
    mask = torch.zeros(3, 3)
    mask[1] = -math.inf
    with refused(InputError, r"\[1\]"):
        layer(mask=mask)


def test_refuses_a_row_that_sees_nothing_together_with_causality() -> None:
    mask = torch.zeros(3, 3)
    mask[0, 0] = -math.inf
    assert layer(mask=mask).mask is not None
    with refused(InputError, r"\[0\]"):
        layer(mask=mask, causal=True)


def test_refuses_a_mask_for_another_length() -> None:
    with refused(InputError, "3 tokens", "has 4"):
        layer(mask=torch.zeros(3, 3))(random(4, 4))


def test_refuses_a_mask_that_is_not_square() -> None:
    with shapes_unchecked(), refused(InputError, "mask", r"\(n, n\)"):
        layer(mask=torch.zeros(3, 4))


def test_reference_jacobian_agrees_with_differences() -> None:
    """The reference itself: complex steps against central differences of the same function."""
    x = random(3, 4).numpy()
    arguments = reference.arguments(layer(mask=random(3, 3), causal=True))
    exact = reference.jacobian(lambda y: reference.attention(y, **arguments), x)
    step = np.zeros_like(x)
    step[1, 2] = 1e-6
    slope = (reference.attention(x + step, **arguments) - reference.attention(x - step, **arguments)) / 2e-6
    np.testing.assert_allclose(exact[:, :, 1, 2], slope, rtol=1e-7, atol=1e-9)
