"""Running error analysis: the bound holds against arithmetic of 64-bit significands, and cannot be far too large."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.layers.mlp import Activation, Mlp
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.rounding import output_rounding
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.running_error import NotTrackedError, error_of, tracked, tracking
from tests.cases import Case

LONG = np.longdouble
"""x86 extended precision: 2^-63, 1024 times finer than what is bounded."""


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def long(value: Tensor | None) -> np.ndarray:
    return np.zeros((), LONG) if value is None else value.numpy().astype(LONG)


def exact_attention(layer: Attention, points: Tensor, mass: Tensor | None) -> np.ndarray:
    """The layer in extended precision."""
    n = points.shape[0]
    mask = np.zeros((n, n), LONG) if layer.mask is None else long(layer.mask)
    if layer.causal:
        mask = np.where(np.triu(np.ones((n, n), bool), 1), -np.inf, mask)
    if mass is not None:
        mask = mask + np.log(long(mass))[None]
    parts = []
    for h in range(layer.heads):
        q, k, v = (
            long(points) @ long(w[h]) + (0 if b is None else long(b[h]))
            for w, b in ((layer.w_q, layer.b_q), (layer.w_k, layer.b_k), (layer.w_v, layer.b_v))
        )
        scores = LONG(layer.factor) * (q @ k.T) + mask
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        part = (weights / weights.sum(axis=1, keepdims=True)) @ v
        parts.append(part if layer.w_o is None else part @ long(layer.w_o[h]))
    out = np.concatenate(parts, axis=1) if layer.w_o is None else sum(parts)
    return np.asarray(out + long(layer.b_o))


@pytest.fixture(autouse=True)
def _no_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate in place of a bound would be NaN, and every comparison with it fails."""
    monkeypatch.setattr("attnrobust.layers.rounding.ESTIMATE", math.nan)


def attention_error(layer: Attention, points: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    output = layer(points, mass)
    actual = torch.from_numpy(np.abs(long(output) - exact_attention(layer, points, mass)).astype(np.float64))
    return actual, output_rounding(layer, points, mass, output)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_the_bound_holds_on_every_case(case: Case, size: float) -> None:
    """Also on tokens a thousand times larger (saturated scores) and smaller."""
    mass = None if case.tokens.uniform else case.tokens.mass
    actual, bound = attention_error(case.attention, size * case.tokens.points, mass)
    assert bool((actual <= bound).all())


def test_a_huge_common_part_of_the_scores_is_charged() -> None:
    """Keys that share a huge component: the softmax drops it, its rounding stays."""
    common, small, value = torch.eye(3)[:, :, None]
    layer = Attention(w_q=common[None], w_k=(common + small)[None], w_v=value[None])
    points = torch.cat([torch.full((6, 1), 1e6 / 3), 3e-6 * draw(6, 1), draw(6, 1, seed=1)], dim=1)
    actual, bound = attention_error(layer, points, None)
    assert float(actual.max()) > 1e-9, "the example is harmless"
    assert bool((actual <= bound).all())
    assert float(bound.max()) < 1e4 * float(actual.max())


def test_the_bound_is_small_on_ordinary_layers(case: Case) -> None:
    mass = None if case.tokens.uniform else case.tokens.mass
    output = case.attention(case.tokens.points, mass)
    bound = output_rounding(case.attention, case.tokens.points, mass, output)
    assert float(bound.norm()) <= 1e-11 * float(output.norm())


W, V, OUT = draw(2, 4, 3, seed=1), draw(2, 4, 3, seed=2), draw(2, 3, 4, seed=3)
ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
LAYERS: dict[str, TokenMap] = {
    "l2": L2Attention(w_q=W, w_v=V, w_o=OUT),
    "cosine": CosineAttention(w_q=W, w_k=V, w_v=V, w_o=OUT),
    "sigmoid": SigmoidAttention(w_q=W, w_k=V, w_v=V, w_o=OUT),
    "lipschitznorm": LipschitzNormAttention(w_q=W, w_k=V, w_v=V, w_o=OUT),
    "kernel": KernelAttention(lambda x, y: -torch.cdist(x, y), "laplace", draw(4, 4)),
    "layer-norm": LayerNorm(draw(4), draw(4, seed=5)),
    "rms-norm": RMSNorm(draw(4), draw(4, seed=5)),
    **{f"mlp-{name}": Mlp(draw(4, 7), draw(7, 4), activation=name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_every_layer_is_followed(name: str, size: float) -> None:
    """Rounding seen in another order of the sums.

    With the tokens in another order the exact output is the same; the two results differ by their roundings, so by at
    most the sum of their bounds.
    """
    layer, points = LAYERS[name], draw(30, 4, seed=9, scale=size)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    first, second = layer(points), layer(points[order])
    bounds = [output_rounding(layer, p, None, f) for p, f in ((points, first), (points[order], second))]
    assert bool(((first[order] - second).abs() <= bounds[0][order] + bounds[1]).all())
    assert float(bounds[0].norm()) <= 1e-4 * float(first.norm())


def test_an_operation_without_a_rule_is_not_passed_over() -> None:
    x = tracked(draw(3))
    with pytest.raises(NotTrackedError, match="lgamma"), tracking():
        torch.lgamma(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 0.7) - 0.7,
        lambda x: x / (x.square().sum(dim=-1, keepdim=True) + 1e-12),
        lambda x: torch.rsqrt(x.square().mean(dim=-1, keepdim=True)) * x,
        lambda x: torch.maximum(x, x.amax(dim=-1, keepdim=True) * 0.5) - x,
        lambda x: torch.linalg.vector_norm(x, dim=-1) * 3.0,
        lambda x: 1.0 / (1.0 + x.square()),
        lambda x: (-x).masked_fill(torch.eye(5, 3).bool(), 2.0),
        lambda x: x.triu().T,
    ],
    ids=["cancel", "divide", "rsqrt", "maximum", "norm", "reversed-divide", "masked-negative", "view"],
)
def test_errors_of_arguments_are_carried(function: Callable[[Tensor], Tensor]) -> None:
    """A function of ``x + 1e4 - 1e4`` against the same function of the exact x."""
    x = draw(5, 3)
    with tracking():
        found = function((tracked(x) + 1e4) - 1e4)
    actual = (found.as_subclass(Tensor) - function(x)).abs()
    assert bool((actual <= error_of(found) + 1e-15 * function(x).abs()).all())
    assert float(actual.max()) > 0


def test_a_copy_of_a_layer_is_not_changed_by_being_followed() -> None:
    layer = replace(next(iter([Attention(w_q=W, w_k=V, w_v=V, w_o=OUT)])))
    points = draw(5, 4)
    before = layer(points)
    output_rounding(layer, points, None, before)
    assert type(layer.w_q) is Tensor
    assert torch.equal(layer(points), before)
