"""Position biases, windows and grouped keys against torch alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**more: Any) -> Attention:
    given: dict[str, Any] = {name: random(2, 4, 3, seed=i) for i, name in enumerate(("w_q", "w_k", "w_v"))}
    return Attention(**(given | more))


def expected(attention: Attention, x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x[..., None, :, :] @ w for w in (attention.w_q, attention.w_k, attention.w_v))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, *bias.shape[-2:]))
    return found.transpose(-3, -2).flatten(-2)


apart = torch.tensor([[j - i for j in range(5)] for i in range(5)])
TABLE = random(2, 5, seed=9)
RULES: dict[str, tuple[HeadBias, Tensor]] = {
    "explicit": (HeadBias(explicit=random(2, 5, 5)), random(2, 5, 5)),
    "alibi": (HeadBias(slopes=torch.tensor([0.5, 0.25])), torch.tensor([0.5, 0.25])[:, None, None] * apart),
    "symmetric": (HeadBias(slopes=torch.ones(2), symmetric=True), -apart.abs().expand(2, 5, 5)),
    "table": (
        HeadBias(table=TABLE),
        torch.stack([torch.stack([TABLE[:, min(max(j - i, -2), 2) + 2] for j in range(5)], 1) for i in range(5)], 1),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_are_those_of_torch(rule: str, causal: bool) -> None:
    head_bias, bias = RULES[rule]
    attention, x = layer(head_bias=head_bias, causal=causal), random(2, 5, 4, seed=3)
    bias = bias.to(torch.float64)
    bias = bias.masked_fill(apart > 0, -math.inf) if causal else bias
    assert_close(attention(x), expected(attention, x, bias), rtol=1e-12)


def test_masses_and_biases_of_heads_add_up() -> None:
    """Masses (2, n) on a batch are not mixed up with biases (2, n, n) of two heads."""
    attention, x = layer(head_bias=HeadBias(explicit=random(2, 3, 3))), random(2, 3, 4)
    mass = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    for b in range(2):
        bias = random(2, 3, 3) + mass[b].log()
        assert_close(attention(x, mass)[b], expected(attention, x[b], bias), rtol=1e-12)


@pytest.mark.parametrize(("left", "right", "causal"), [(1, None, True), (0, 0, False), (2, 1, False), (None, 1, False)])
def test_windows_hide_what_is_far(left: int | None, right: int | None, causal: bool) -> None:
    attention, x = layer(window_left=left, window_right=right, causal=causal), random(5, 4)
    hidden = apart > (0 if causal else 5 if right is None else right)
    hidden |= apart < (-5 if left is None else -left)
    assert_close(attention(x), expected(attention, x, torch.zeros(5, 5).masked_fill(hidden, -math.inf)), rtol=1e-12)


def test_a_row_that_sees_nothing_is_refused() -> None:
    mask = torch.zeros(3, 3).fill_diagonal_(-math.inf)
    with refused(InputError, "every key from query rows"):
        layer(mask=mask, window_left=0, window_right=0)


def test_grouped_keys_are_checked_and_no_feature() -> None:
    w_k, w_v = (random(1, 4, 3, seed=s).expand(2, 4, 3) for s in (5, 6))
    grouped = layer(w_k=w_k, w_v=w_v, kv_heads=1)
    assert grouped.features == frozenset()
    assert grouped.digest == layer(w_k=w_k, w_v=w_v).digest
    with refused(InputError, "kv_heads is 1", "w_k"):
        layer(kv_heads=1)
    with refused(InputError, "kv_heads is 3", "divide"):
        layer(kv_heads=3)


def test_other_devices_take_the_positions_along() -> None:
    attention = layer(head_bias=HeadBias(table=TABLE))
    assert attention.to("cpu").digest == attention.digest
    assert_same_bits(attention.to("cpu")(random(3, 4)), attention(random(3, 4)))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "one rule"),
        ({"slopes": torch.ones(2), "table": torch.ones(2, 3)}, "one rule"),
        ({"explicit": torch.full((2, 3, 3), -math.inf)}, "infinite"),
        ({"explicit": torch.ones(2, 3, 4)}, "h, n, n"),
        ({"table": torch.ones(2, 4)}, "odd"),
        ({"table": torch.ones(2, 3), "symmetric": True}, "symmetric"),
        ({"slopes": torch.ones(2, 2)}, "1 dimensions"),
    ],
)
def test_records_that_make_no_sense_are_refused(given: Any, word: str) -> None:
    with shapes_unchecked(), refused(InputError, word):
        HeadBias(**given)


def test_layers_refuse_biases_that_do_not_fit() -> None:
    with refused(InputError, "3 heads", "2"):
        layer(head_bias=HeadBias(slopes=torch.ones(3)))
    with shapes_unchecked(), refused(InputError, "HeadBias", "Tensor"):
        layer(head_bias=torch.ones(2, 3, 3))
    with refused(InputError, "for 5 tokens", "3"):
        layer(head_bias=HeadBias(explicit=torch.ones(2, 5, 5)))(random(3, 4))
