"""Rotary positions against the formulas that models use, written with torch alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(k: int = 6, **more: Any) -> Attention:
    given: dict[str, Any] = {name: random(2, 4, k, seed=i) for i, name in enumerate(("w_q", "w_k", "w_v"))}
    return Attention(**given, b_q=random(2, k, seed=4), b_k=random(2, k, seed=5), **more)


def half(x: Tensor, angles: Tensor) -> Tensor:
    """The formula of Llama and GPT-NeoX: ``x cos + (-x_2, x_1) sin`` on the first 2 m coordinates."""
    m = angles.shape[-1]
    turned, rest = x[..., : 2 * m], x[..., 2 * m :]
    cosine, sine = torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()
    swapped = torch.cat([-turned[..., m:], turned[..., :m]], dim=-1)
    return torch.cat([turned * cosine + swapped * sine, rest], dim=-1)


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    """The formula of GPT-J and Cohere: coordinate pairs as complex numbers."""
    m = angles.shape[-1]
    pairs = torch.view_as_complex(x[..., : 2 * m].unflatten(-1, (m, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
    return torch.cat([turned, x[..., 2 * m :]], dim=-1)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_and_output_are_those_of_the_models(layout: Any, planes: int) -> None:
    frequencies, x = random(planes, seed=7), random(3, 5, 4, seed=8)
    attention = layer(rotary=Rotary(frequencies, layout=layout, offset=3))
    angles = (torch.arange(5, dtype=torch.float64) + 3)[:, None] * frequencies
    turn = half if layout == "half" else interleaved
    q, k, v = (
        x[:, None] @ w + (0 if b is None else b[:, None])
        for w, b in ((attention.w_q, attention.b_q), (attention.w_k, attention.b_k), (attention.w_v, None))
    )
    q, k = turn(q, angles), turn(k, angles)
    assert_close(attention.queries(x), q, rtol=1e-14, what="queries")
    assert_close(attention.scores(x), q @ k.mT / math.sqrt(6), rtol=1e-13, what="scores")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(attention(x), expected.transpose(1, 2).flatten(2), rtol=1e-12, what="output")


def test_turning_back_is_the_adjoint_and_the_inverse() -> None:
    rotary, x, y = Rotary(random(2), layout="interleaved"), random(2, 3, 5), random(2, 3, 5, seed=1)
    assert_close(rotary.turn_back(rotary.turn(x)), x, rtol=1e-15)
    assert_close((rotary.turn(x) * y).sum(), (x * rotary.turn_back(y)).sum(), rtol=1e-14)


def test_only_differences_of_positions_count() -> None:
    x, frequencies = random(4, 4), random(3)
    first, later = (layer(rotary=Rotary(frequencies, offset=offset)) for offset in (0, 50))
    assert_close(later(x), first(x), rtol=1e-12)
    assert first.digest != later.digest


def test_angles_say_where_the_tokens_stand() -> None:
    x, frequencies = random(3, 4), random(3)
    places = torch.tensor([0.0, 4.0, 1.0], dtype=torch.float64)
    sparse = layer(rotary=Rotary(angles=places[:, None] * frequencies))
    whole = layer(rotary=Rotary(frequencies))
    longer = torch.zeros(5, 4, dtype=torch.float64)
    longer[places.long()] = x
    assert_same_bits(sparse.keys(x), whole.keys(longer)[:, places.long()])
    with refused(InputError, "3 tokens", "4"):
        sparse(random(4, 4))


def test_equal_angles_change_nothing() -> None:
    x = random(3, 4)
    assert_close(layer(rotary=Rotary(angles=random(1, 3).expand(3, 3)))(x), layer()(x), rtol=1e-12)


def test_key_biases_no_longer_cancel() -> None:
    x, rotary = random(3, 4), Rotary(random(3))
    plain = {name: getattr(layer(), name) for name in ("w_q", "w_k", "w_v", "b_q")}
    assert not torch.allclose(layer(rotary=rotary)(x), Attention(**plain, rotary=rotary)(x), rtol=1e-3)


def test_there_is_no_common_form() -> None:
    attention = layer(rotary=Rotary(random(3)))
    for name in ("bilinear", "key_offset"):
        with refused(UnsupportedModelError, "rotary"):
            getattr(attention, name)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "exactly one"),
        ({"frequencies": torch.ones(2), "angles": torch.ones(3, 2)}, "exactly one"),
        ({"frequencies": torch.tensor([math.nan])}, "NaN"),
        ({"frequencies": torch.ones(2, 2)}, "1 dimensions"),
        ({"angles": torch.ones(2)}, "2 dimensions"),
        ({"frequencies": torch.ones(2), "layout": "other"}, "interleaved"),
        ({"frequencies": torch.ones(2), "dims": 6}, "dims is 6"),
        ({"angles": torch.ones(2, 2), "offset": 1}, "offset"),
    ],
)
def test_records_that_make_no_sense_are_refused(given: Any, word: str) -> None:
    with shapes_unchecked(), refused(InputError, word):
        Rotary(**given)


def test_layers_refuse_positions_that_do_not_fit() -> None:
    with refused(InputError, "8 coordinates", "6"):
        layer(rotary=Rotary(torch.ones(4)))
    with refused(InputError, "different numbers of tokens", "mask 3", "rotary 2"):
        layer(rotary=Rotary(angles=torch.ones(2, 3)), mask=torch.zeros(3, 3))
