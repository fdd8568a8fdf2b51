"""L2, cosine, sigmoid and LipschitzNorm attention: slow references, exact answers, invariances, and both wings' use."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.goals import Displacement
from attnrobust.layers.heads import HeadSpecification
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention, smooth_unit
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests import slow_layers
from tests.assertions import assert_at_most, assert_close, assert_same_bits, refused, shapes_unchecked
from tests.reference import jacobian

H, D, K, V, E, N = 2, 5, 3, 4, 6, 6
Build = Callable[..., HeadSpecification]


def random(*shape: int, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def l2(**more: Any) -> L2Attention:
    return L2Attention(**({"w_q": random(H, D, K), "w_v": random(H, D, V)} | more))


def _dot(kind: type[HeadSpecification], **more: Any) -> Any:
    return kind(**({"w_q": random(H, D, K), "w_k": random(H, D, K), "w_v": random(H, D, V)} | more))


def cosine(**more: Any) -> CosineAttention:
    built: CosineAttention = _dot(CosineAttention, **({"tau": 1.7, "nu": 0.6, "eps": 0.05} | more))
    return built


def sigmoid(**more: Any) -> SigmoidAttention:
    built: SigmoidAttention = _dot(SigmoidAttention, **more)
    return built


def lipschitznorm(**more: Any) -> LipschitzNormAttention:
    built: LipschitzNormAttention = _dot(LipschitzNormAttention, **more)
    return built


LAYERS: dict[str, tuple[Build, Callable[..., Any]]] = {
    "l2": (l2, slow_layers.l2),
    "cosine": (cosine, slow_layers.cosine),
    "sigmoid": (sigmoid, slow_layers.sigmoid),
    "lipschitznorm": (lipschitznorm, slow_layers.lipschitznorm),
}
MEASURE = [name for name in LAYERS if name != "lipschitznorm"]
each_layer = pytest.mark.parametrize("name", LAYERS)


def slow(name: str, layer: HeadSpecification, x: Any, **more: Any) -> Any:
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}  # type: ignore[arg-type]
    arguments = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in values.items()}
    return LAYERS[name][1](x, **arguments, **more)


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


def test_l2_weights_do_not_change_when_all_tokens_move_alike() -> None:
    layer, x, shift = l2(scale=0.9), random(N, D), 50.0 * random(D)
    moved = shift[None] @ layer.metric @ layer.w_v
    assert_close(layer(x + shift), layer(x) + moved.flatten(), rtol=1e-12)
    # So far from 0 that squares of the coordinates (1e14) are rounded to 1e-2; the outputs (1e7) are to 1e-8.
    far = 1e7 * random(D)
    exact = torch.from_numpy(slow("l2", layer, (x + far).numpy()))
    assert_close(layer(x + far), exact, rtol=0.0, atol=1e-6)


def test_l2_without_queries_is_constant() -> None:
    layer = l2(w_q=torch.zeros(H, D, K), b_o=random(H * V))
    assert_close(layer(random(N, D)), layer.b_o.expand(N, -1), rtol=0.0)


def test_cosine_output_is_bounded_and_nearly_scale_free() -> None:
    layer, x = cosine(eps=1e-12), random(N, D)
    assert_close(layer(1000.0 * x), layer(x), rtol=1e-9)
    heads = layer(1e6 * x).reshape(N, H, V)
    assert_at_most(float(torch.linalg.vector_norm(heads, dim=-1).max()), layer.nu, rtol=1e-12)


def test_sigmoid_without_queries_is_half_the_mean() -> None:
    layer, x = sigmoid(w_q=torch.zeros(H, D, K)), random(N, D)
    expected = 0.5 * torch.cat([x.mean(dim=0) @ w for w in layer.w_v])
    assert_close(layer(x), expected.expand(N, -1), rtol=1e-13)
    shifted = replace(layer, shift=math.log(3.0))  # sigma(log 3) = 3/4
    assert_close(shifted(x), 1.5 * expected.expand(N, -1), rtol=1e-13)


def test_lipschitznorm_is_homogeneous() -> None:
    layer, x = lipschitznorm(b_o=random(H * V)), random(N, D)
    assert layer.b_o is not None
    for factor in (1e-6, 3.0, 1e6):
        assert_close(layer(factor * x) - layer.b_o, factor * (layer(x) - layer.b_o), rtol=1e-9)


def test_lipschitznorm_of_zero_is_zero() -> None:
    for layer in (lipschitznorm(), lipschitznorm(w_q=torch.zeros(H, D, K)), lipschitznorm(w_k=torch.zeros(H, D, K))):
        zero = torch.zeros(N, D, dtype=torch.float64)
        assert_same_bits(layer(zero), torch.zeros(N, H * V, dtype=torch.float64))
        assert bool(torch.isfinite(torch.func.jacrev(layer)(zero)).all())
    silent, x = lipschitznorm(w_q=torch.zeros(H, D, K)), random(N, D)
    assert_close(silent(x), torch.cat([x.mean(dim=0) @ w for w in silent.w_v]).expand(N, -1), rtol=1e-13)


def test_lipschitznorm_refuses_masses() -> None:
    with refused(UnsupportedModelError, "counts tokens"):
        lipschitznorm()(random(N, D), torch.full((N,), 1 / N, dtype=torch.float64))


def test_the_metric_in_the_value_path_makes_l2_attention_lipschitz() -> None:
    """Tokens far apart along the kernel of w_q^T: the weights cannot see it, the values can."""
    w_q, w_v = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    layer = L2Attention(w_q=w_q, w_v=w_v)
    norms = []
    for spread in (1.0, 10.0, 100.0):
        x = torch.tensor([[0.0, -spread], [0.5, spread]], dtype=torch.float64)
        bare = jacobian(lambda z: slow_layers.l2(z, w_q.numpy(), w_v.numpy(), metric=False), x.numpy())
        norms.append(np.linalg.norm(bare.reshape(2, 4), 2))
        norm = torch.linalg.matrix_norm(torch.func.jacrev(layer)(x).reshape(2, 4), 2)
        # Derived bound with c (c e^(c+1) = n - 1 = 1): scale |w_q|^2 |w_v| (sqrt(n) (1 + 2c) + 2c), c = 0.2785.
        assert_at_most(float(norm), math.sqrt(2) * (1 + 2 * 0.2785) + 2 * 0.2785)
    assert norms[2] > 9.0 * norms[1] > 80.0 * norms[0]


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
