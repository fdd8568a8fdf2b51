"""Shapes are checked at the beginning of every test, and not for ever."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import shape_checks
from tests.cases import case_named


def test_the_first_calls_are_checked_and_the_later_ones_are_not() -> None:
    layer = case_named("causal").attention
    wrong = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(TypeCheckError):
        layer.weights(wrong)
    for _ in range(shape_checks.CALLS):
        layer.weights(torch.zeros(1, layer.width, dtype=torch.float64))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        layer.weights(wrong)
