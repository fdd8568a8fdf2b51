"""What every kind of attention owes: the values of its slow formula, invariances, records and refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention, smooth_unit
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits, refused, shapes_unchecked
from tests.layer_variants import LAYERS, Build, D, E, H, K, N, V, cosine, l2, lipschitznorm, random, sigmoid, slow
from tests.reference import jacobian

MEASURE = [name for name in LAYERS if name != "lipschitznorm"]
each_layer = pytest.mark.parametrize("name", LAYERS)


VARIANTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "bare": dict,
    "projected": lambda: {"w_o": random(H, V, E), "b_o": random(E)},
    "biased": lambda: {"b_o": random(H * V)},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- against the reference -------------------------------------------------------------------------------------------


@each_variant
@each_layer
def test_agrees_with_the_formula(name: str, variant: str) -> None:
    layer, x = LAYERS[name][0](**VARIANTS[variant]()), random(N, D, scale=1.0)
    assert (layer.heads, layer.width, layer.value_width) == (H, D, V)
    assert layer.out_width == (E if variant == "projected" else H * V)
    assert_close(layer(x), torch.from_numpy(slow(name, layer, x.numpy())), rtol=1e-13)


@pytest.mark.parametrize("name", MEASURE)
def test_masses_agree_with_the_formula(name: str) -> None:
    layer, x, mass = LAYERS[name][0](), random(N, D), torch.softmax(random(N, scale=2.0), dim=0)
    expected = torch.from_numpy(slow(name, layer, x.numpy(), mass=mass.numpy()))
    assert_close(layer(x, mass), expected, rtol=1e-13)
    assert_close(layer(x, torch.full((N,), 1 / N, dtype=torch.float64)), layer(x), rtol=1e-13)


@each_layer
def test_derivatives_agree_with_complex_steps(name: str) -> None:
    layer, x = LAYERS[name][0](w_o=random(H, V, E)), random(N, D)
    expected = torch.from_numpy(jacobian(lambda z: slow(name, layer, z), x.numpy()))
    assert_close(torch.func.jacrev(layer)(x), expected, rtol=1e-12)


@each_layer
def test_second_derivatives_agree_with_differences(name: str) -> None:
    layer, x, direction = LAYERS[name][0](), random(3, D), random(3, D)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda y: layer(y).square().sum())(z)

    product = torch.func.grad(lambda z: (gradient(z) * direction).sum())(x)
    step = 1e-5
    difference = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    assert_close(product, difference, rtol=1e-7)


@each_layer
def test_batches_are_inputs_side_by_side(name: str) -> None:
    layer, x = LAYERS[name][0](), random(2, 3, N, D)
    expected = torch.stack([torch.stack([layer(one) for one in row]) for row in x])
    assert_close(layer(x), expected, rtol=1e-13)


@pytest.mark.parametrize("name", MEASURE)
def test_batches_of_masses(name: str) -> None:
    layer, x = LAYERS[name][0](), random(2, N, D)
    mass = torch.softmax(random(2, N), dim=-1)
    assert_close(layer(x, mass), torch.stack([layer(x[0], mass[0]), layer(x[1], mass[1])]), rtol=1e-13)
    assert_close(layer(x, mass[0]), torch.stack([layer(x[0], mass[0]), layer(x[1], mass[0])]), rtol=1e-13)


# ---- exact answers ---------------------------------------------------------------------------------------------------


@each_layer
def test_permuted_tokens_give_permuted_outputs(name: str) -> None:
    layer, x, order = LAYERS[name][0](), random(N, D), torch.randperm(N)
    assert_close(layer(x[order]), layer(x)[order], rtol=1e-12)


@pytest.mark.parametrize("name", MEASURE)
def test_a_duplicate_is_the_double_mass(name: str) -> None:
    layer, x = LAYERS[name][0](), random(3, D)
    mass = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    doubled = layer(x[[0, 0, 1, 2]])
    assert_close(layer(x, mass), doubled[[0, 2, 3]], rtol=1e-13)


def test_one_token() -> None:
    x = random(1, D)
    layer = l2(scale=0.4)
    assert_close(layer(x)[0], (x @ layer.metric @ layer.w_v).flatten(), rtol=1e-13)
    same: CosineAttention = cosine()
    values = 0.6 * smooth_unit(x @ same.w_v, 0.05)
    assert_close(same(x)[0], values.flatten(), rtol=1e-13)
    other = lipschitznorm()
    assert_close(other(x)[0], (x @ other.w_v).flatten(), rtol=1e-13)


@each_layer
def test_equal_tokens_are_one_token(name: str) -> None:
    layer, x = LAYERS[name][0](), random(1, D)
    assert_close(layer(x.expand(N, D)), layer(x).expand(N, -1), rtol=1e-13)


# ---- records ---------------------------------------------------------------------------------------------------------


@each_layer
def test_is_a_token_map_with_its_own_digest(name: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name][0]()
    torch.manual_seed(1)
    assert isinstance(layer, TokenMap)
    assert LAYERS[name][0]().digest == layer.digest
    changed = replace(layer, w_v=layer.w_v + 1e-12)  # type: ignore[type-var]
    digests = {layer.digest, changed.digest, replace(layer, b_o=torch.zeros(H * V)).digest}  # type: ignore[type-var]
    assert len(digests) == 3
    assert layer.to("cpu").digest == layer.digest


def test_numbers_and_kinds_are_part_of_the_digest() -> None:
    weights: dict[str, Any] = {name: random(H, D, K) for name in ("w_q", "w_k", "w_v")}
    layers = [
        CosineAttention(**weights),
        CosineAttention(**weights, tau=2.0),
        CosineAttention(**weights, nu=2.0),
        CosineAttention(**weights, eps=2.0),
        SigmoidAttention(**weights),
        SigmoidAttention(**weights, shift=1.0),
        SigmoidAttention(**weights, scale=1.0),
        LipschitzNormAttention(**weights),
        L2Attention(w_q=weights["w_q"], w_v=weights["w_v"]),
        L2Attention(w_q=weights["w_q"], w_v=weights["w_v"], scale=2.0),
    ]
    assert len({layer.digest for layer in layers}) == len(layers)


@each_layer
def test_weights_are_owned(name: str) -> None:
    weight = random(H, D, V)
    layer = LAYERS[name][0](w_v=weight)
    before = layer.w_v.clone()
    weight += 1.0
    assert_same_bits(layer.w_v, before)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"w_v": torch.zeros(H, D + 1, V)}, "w_v must have shape"),
        ({"w_q": torch.zeros(H + 1, D, K)}, "must have shape"),
        ({"w_q": torch.zeros(D, K)}, "w_q must have 3 dimensions"),
        ({"w_v": torch.zeros(H, D, 0)}, "w_v must have 3 dimensions"),
        ({"w_o": torch.zeros(H, V + 1, E)}, "w_o must have shape"),
        ({"b_o": torch.zeros(H * V + 1)}, "b_o must have shape"),
        ({"w_v": torch.full((H, D, V), torch.nan)}, "w_v holds"),
        ({"w_v": torch.zeros(H, D, V, dtype=torch.int64)}, "w_v has dtype"),
    ],
)
@each_layer
def test_refuses_weights(name: str, changes: dict[str, Tensor], word: str) -> None:
    with shapes_unchecked(), refused(InputError, word):
        LAYERS[name][0](**changes)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (l2, {"scale": 0.0}),
        (l2, {"scale": math.inf}),
        (cosine, {"tau": 0.0}),
        (cosine, {"nu": -1.0}),
        (cosine, {"eps": 0.0}),
        (cosine, {"eps": math.nan}),
        (sigmoid, {"scale": math.nan}),
        (sigmoid, {"shift": math.inf}),
    ],
)
def test_refuses_numbers(build: Build, changes: dict[str, float]) -> None:
    with refused(InputError, next(iter(changes))):
        build(**changes)


# ---- use -------------------------------------------------------------------------------------------------------------


@each_layer
def test_can_be_attacked(name: str) -> None:
    layer = LAYERS[name][0]()
    problem = Problem(layer, TokenMeasure(random(3, D)), FrobeniusBall(), Displacement(tolerance=0.05, relative=True))
    result = attack(problem, budget=AttackBudget(restarts=2, steps=20))
    assert result.status is Status.FOUND
    assert result.perturbed is not None
    assert_at_most(1.0, float(problem.usage(result.perturbed - problem.clean.points)), rtol=1e-12)
