"""Zeros, suprema and slopes of the activations against fine grids."""

import pytest
import torch

from attnrobust.certify.network.node_bounds.activation_ranges import (
    SHAPES,
    largest_slope,
    remainder_slope,
    shape_of,
    slope_range,
)
from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.activation_functions import FUNCTIONS

STEP = 1e-5


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "identity"])
def test_zeros_and_suprema(name: str) -> None:
    x = torch.arange(-12.0, 12.0, STEP, dtype=torch.float64)
    higher = FUNCTIONS[name].higher
    assert higher is not None
    second, third = higher(x)
    fourth = ((third[1:] - third[:-1]) / STEP).abs().max()
    assert float(second.abs().max()) + 0.5 * STEP * float(third.abs().max()) <= SHAPES[name].second * (1 + 1e-12) + 1e-5
    assert float(second.abs().max()) <= SHAPES[name].second
    assert (
        float(third.abs().max()) + 0.5 * STEP * float(fourth)
        <= SHAPES[name].third + (name in ("tanh", "sigmoid")) * 1e-4
    )
    assert SHAPES[name].third <= 1.002 * float(third.abs().max())
    turns = x[:-1][(second[:-1] > 0) != (second[1:] > 0)]
    assert torch.allclose(turns, torch.tensor(SHAPES[name].bends, dtype=torch.float64), atol=2 * STEP)


@pytest.mark.parametrize("name", ["relu", *SHAPES])
def test_slopes_of_chords_and_remainders(name: str) -> None:
    torch.manual_seed(0)
    x, reach = 3.0 * torch.randn(400, dtype=torch.float64), torch.rand(400, dtype=torch.float64).log().neg()
    t = reach * torch.linspace(-1.0, 1.0, 401, dtype=torch.float64)[:, None]
    t = torch.where(t == 0, 1e-3 * reach, t)
    phi = FUNCTIONS[name]
    chord = phi.value(x + t) - phi.value(x)
    rest = chord - phi.slope(x) * t
    slopes, remainders = largest_slope(name, x, reach), remainder_slope(name, x, reach)
    cancelled = 1e-15 * (1.0 + x.abs() + reach)
    assert bool((chord.abs() <= slopes * t.abs() + cancelled).all())
    assert bool((rest.abs() <= remainders * t.abs() + cancelled).all())
    low, high = slope_range(name, x - reach, x + reach)
    inside = phi.slope(x + t)
    assert bool(((low <= inside + 1e-12) & (inside <= high + 1e-12)).all())
    if name != "identity":
        nearly = (rest / t).abs().amax(dim=0) >= 0.9 * remainders - 1e-9
        assert float(nearly.to(torch.float64).mean()) > (0.99 if name == "relu" else 0.1)


def test_a_function_without_a_list_of_bends_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mish"):
        shape_of("mish")
