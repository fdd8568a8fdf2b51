"""Rates of splitting against the exact derivative at copied tokens."""

from dataclasses import replace

import pytest
import torch

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Rotary
from attnrobust.lipschitz.splitting import own_query_blocks, splitting_rates
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close, refused


@pytest.mark.parametrize("projected", [True, False])
def test_the_spectrum_at_copied_tokens(projected: bool) -> None:
    """Every token twice: the derivative's singular values are those at the tokens, and those of every Q_i."""
    w = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    layer = Attention(w_q=w[0], w_k=w[1], w_v=w[2], w_o=w[3].transpose(1, 2) if projected else None)
    clean = TokenMeasure(torch.randn(3, 3, dtype=torch.float64))

    def spectrum(points: torch.Tensor) -> torch.Tensor:
        jacobian = torch.func.jacrev(layer)(points).reshape(points.shape[0] * layer.out_width, -1)
        return torch.linalg.svdvals(jacobian)

    once, twice = spectrum(clean.points), spectrum(clean.points.repeat(2, 1))
    split = torch.linalg.svdvals(own_query_blocks(layer, clean)).flatten()
    together = torch.cat([once, split]).sort(descending=True).values
    assert_close(together[: twice.numel()], twice[: together.numel()], rtol=1e-8, atol=1e-10)
    rates = splitting_rates(layer, clean)
    assert rates.moving.value <= float(once[0]) <= rates.moving.value * (1.0 + 1e-9)
    assert rates.best_splitting.value == pytest.approx(float(split.max()))


def test_refuses_masks() -> None:
    w = torch.randn(1, 2, 2)
    with refused(UnsupportedModelError, "mask"):
        splitting_rates(Attention(w_q=w, w_k=w, w_v=w, causal=True), TokenMeasure(torch.randn(3, 2)))


def test_refuses_layers_in_which_places_matter() -> None:
    """Each has rates without its positions; with them no token may be at two places, so there is nothing to split."""
    w = torch.randn(1, 2, 2)
    plain = Attention(w_q=w, w_k=w, w_v=w)
    clean = TokenMeasure(torch.randn(3, 2))
    assert splitting_rates(plain, clean).moving.value > 0
    placed = (
        replace(plain, rotary=Rotary(torch.tensor([1.0]))),
        replace(plain, head_bias=HeadBias(slopes=torch.tensor([0.5]))),
        replace(plain, window_left=1),
        replace(plain, window_right=1),
    )
    for layer in placed:
        with refused(UnsupportedModelError, "positions"):
            splitting_rates(layer, clean)
