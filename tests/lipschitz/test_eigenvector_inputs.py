"""Lower bounds of Lipschitz constants: attained by their inputs, above the closed forms, below every upper bound."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import mean_field_constant
from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.lipschitz import eigenvector_inputs
from attnrobust.lipschitz.eigenvector_inputs import finite_lower, mean_field_lower
from tests.cases import cases
from tests.eigenvector_lower import eigenvector_lower


def _scalar(a: float, *, causal: bool = False) -> Attention:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Attention(w_q=one, w_k=a * one, w_v=one, scale=1.0, causal=causal)


def _gaussian(seed: int, *, symmetric: bool = False) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    w_q, w_k, w_v = torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    return Attention(w_q=w_q, w_k=w_q if symmetric else w_k, w_v=w_v, scale=0.5)


def _autograd_norm(layer: Attention, points: Tensor) -> float:
    jacobian = torch.func.jacrev(layer)(points)
    return float(torch.linalg.matrix_norm(jacobian.flatten(0, 1).flatten(1), 2))


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("radius", [0.0, 0.5, 2.0])
@pytest.mark.one_in(2)
def test_finite_bound_is_attained_by_its_input(n: int, radius: float) -> None:
    for seed in range(5):
        layer = _gaussian(seed)
        witness = finite_lower(layer, n, radius)
        assert bool((torch.linalg.vector_norm(witness.tokens.points, dim=-1) <= radius * (1 + 1e-12)).all())
        assert witness.lower.value == pytest.approx(_autograd_norm(layer, witness.tokens.points), rel=1e-8)
        assert witness.lower.value <= ball_constant(layer, n, radius).value
        assert eigenvector_lower(layer, radius, n=n) <= witness.lower.value * (1 + 1e-9)


@pytest.mark.parametrize("a", [-1.0, 1.0])
def test_finite_bound_grows_like_the_root_of_n(a: float) -> None:
    """As long as n is far below e^{2 gamma R^2}: four times the tokens, twice the bound."""
    radius = 4.0 if a < 0 else 12.0
    few, many = (finite_lower(_scalar(a), n, radius).lower.value for n in (17, 65))
    assert many / few == pytest.approx(2.0, rel=0.04)


@pytest.mark.parametrize(("a", "growth"), [(-1.0, 1.0), (8.0, 1.0)])
def test_measures_grow_super_exponentially(a: float, growth: float) -> None:
    """d = 1: the closed form (1 + g) e^g / 2 with g = gamma R^2 is reached by two atoms."""
    closed = 0.0
    for size in (0.5, 2.0, 6.0, 20.0):
        witness = mean_field_lower(_scalar(a), math.sqrt(size))
        closed = eigenvector_lower(_scalar(a), math.sqrt(size))
        assert closed == pytest.approx(0.5 * (1 + growth * size) * math.exp(growth * size), rel=1e-8)
        assert witness.lower.value >= closed * (1 - 1e-9)
        assert witness.lower.value <= mean_field_constant(_scalar(a), math.sqrt(size)).value
    # The true exponent is a = ||B|| R^2: both sides agree within a factor 2.5 where A < 0.
    if a < 0:
        assert mean_field_constant(_scalar(a), math.sqrt(20.0)).value <= 2.42 * closed


def test_lower_never_above_upper() -> None:
    for case in cases(max_n=6)[::2]:
        layer = case.attention
        if layer.mask is not None:
            with pytest.raises(InputError, match="mask"):
                finite_lower(layer, 3, 1.0)
            continue
        radius = 1.2
        assert finite_lower(layer, 3, radius).lower.value <= ball_constant(layer, 3, radius).value + 1e-15
        if not layer.causal:
            lower = mean_field_lower(layer, radius).lower.value
            assert lower <= mean_field_constant(layer, radius).value + 1e-15


def test_refusals() -> None:
    with pytest.raises(InputError, match="no order"):
        mean_field_lower(_scalar(1.0, causal=True), 1.0)
    with pytest.raises(InputError, match="radius >= 0"):
        finite_lower(_scalar(1.0), 3, -1.0)


def test_inputs_ranked_together_or_one_by_one_end_in_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _gaussian(0)
    together = finite_lower(layer, 4, 2.0), mean_field_lower(layer, 2.0)
    monkeypatch.setattr(eigenvector_inputs, "TOGETHER", 1)
    for one, other in zip(together, (finite_lower(layer, 4, 2.0), mean_field_lower(layer, 2.0)), strict=True):
        assert one.lower.value == pytest.approx(other.lower.value, rel=1e-9)
