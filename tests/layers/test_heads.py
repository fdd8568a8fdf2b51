"""What every multi-head record shares: identities that never change, and one formula for records and modules."""

from collections.abc import Callable

import pytest
import torch

from attnrobust.layers.attention import Attention
from attnrobust.layers.heads import HeadSpecification
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention

W = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
W_O, B_O = torch.ones(2, 2, 3), torch.ones(3)
RECORDED: dict[str, Callable[[], HeadSpecification]] = {
    "e1c50a47b0116660": lambda: Attention(w_q=W, w_k=-W, w_v=W, b_q=torch.ones(2, 2), w_o=W_O, b_o=B_O, causal=True),
    "e719e05aa7495751": lambda: L2Attention(w_q=W, w_v=W, w_o=W_O, b_o=B_O),
    "48e8b88a609d2355": lambda: CosineAttention(w_q=W, w_k=-W, w_v=W, w_o=W_O, b_o=B_O, tau=2.0),
    "119bdaecc425ac6e": lambda: SigmoidAttention(w_q=W, w_k=-W, w_v=W, w_o=W_O, b_o=B_O, shift=1.0),
    "a43467b8dd566719": lambda: LipschitzNormAttention(w_q=W, w_k=-W, w_v=W, w_o=W_O, b_o=B_O),
}


@pytest.mark.parametrize("digest", RECORDED)
def test_digests_never_change(digest: str) -> None:
    """Results on disk are told apart by them: a new digest of an old layer would orphan every stored row."""
    assert RECORDED[digest]().digest.startswith(digest)


@pytest.mark.parametrize("digest", RECORDED)
def test_sizes_are_those_of_the_weights(digest: str) -> None:
    layer = RECORDED[digest]()
    assert (layer.heads, layer.width, layer.key_width, layer.value_width, layer.out_width) == (2, 3, 2, 2, 3)
    assert layer.device == W.device
