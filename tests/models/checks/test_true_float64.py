"""No rounding to a shorter type inside of a forward pass."""

import torch

from attnrobust.models.checks.true_float64 import TrueFloat64
from tests.assertions import assert_same_bits


def test_casts_to_shorter_types_keep_float64() -> None:
    x = torch.randn(5, dtype=torch.float64)
    with TrueFloat64():
        found = [x.float(), x.to(torch.float32), x.to(dtype=torch.bfloat16), x.half(), x.type(torch.float16)]
        made = [torch.softmax(x, dim=0, dtype=torch.float32), torch.arange(3, dtype=torch.float32) / 3]
        whole = x.to(torch.int64)
    for value in found:
        assert_same_bits(value, x)
    assert_same_bits(made[0], torch.softmax(x, dim=0))
    assert_same_bits(made[1], torch.arange(3, dtype=torch.float64) / 3)
    assert whole.dtype == torch.int64
    assert x.float().dtype == torch.float32
