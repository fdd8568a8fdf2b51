"""Soundness in volume: every bound on 1000 random problems and by gradient ascent on 100, with masks, biases, masses.

Run with ``-m slow``; the fast tests of each bound are beside it, those of measures in test_measure_certificates.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from attnrobust.certify import CertificateMethod
from attnrobust.certify.closed_form.castin2024_mean_field import kernel_constant, masked_constant, mean_field_constant
from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_constant
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.lipschitz.at_an_input import diameter_norm_upper, local_norm_upper, softmax_norm_upper
from attnrobust.numerics.softmax import derivative_norm_upper
from attnrobust.problem import Problem, TokenMap
from attnrobust.tokens import TokenMeasure
from tests import stress
from tests.cases import Case, goals, threats
from tests.measure_problems import Draw
from tests.methods import MOVING_METHODS
from tests.seeded_variants import LAYERS

pytestmark = pytest.mark.slow
RANDOM, ASCENDED = 1000, 100
BLOCKS = 10  # of each
OTHER = {method.name for _, method in LAYERS}
OWN_MEASURE = {"conic-margin"}  # seconds a problem; its own tests sample its set
FOR_ATTENTION = tuple(m for m in MOVING_METHODS if m.name not in OTHER | OWN_MEASURE)
amounts = pytest.mark.parametrize(
    ("indices", "ascend"),
    [
        pytest.param(range(block * total // BLOCKS, (block + 1) * total // BLOCKS), ascend, id=f"{name}-{block}")
        for total, ascend, name in ((RANDOM, False, "random"), (ASCENDED, True, "ascent"))
        for block in range(BLOCKS)
    ],
)


def random_attention(draw: Draw, index: int, n: int) -> Attention:
    """Heads, widths, biases, masks, causality and output projections of every kind."""
    d, heads, k = draw.integer(1, 4), draw.integer(1, 3), draw.integer(1, 3)
    biases = index % 2 == 1
    mask = None
    if index % 5 == 0:
        mask = draw(n, n).masked_fill((draw(n, n) > 0.7) & ~torch.eye(n, dtype=torch.bool), -math.inf)
    return Attention(
        w_q=10 ** draw.uniform(-1.2, 0.7) * draw(heads, d, k),
        w_k=draw(heads, d, k),
        w_v=draw(heads, d, 2),
        b_q=draw(heads, k) if biases else None,
        b_k=draw(heads, k) if biases else None,
        b_v=draw(heads, 2) if biases else None,
        w_o=draw(heads, 2, 3) if index % 3 else None,
        mask=mask,
        causal=index % 4 == 0,
    )


def random_mass(draw: Draw, index: int, n: int) -> Tensor | None:
    return torch.softmax(draw(n, scale=2.0), dim=0) if index % 3 == 0 else None


def asked(layer: Attention, points: Tensor, mass: Tensor | None, index: int) -> Iterator[Problem]:
    """Every threat with a goal, starting at another pair each time."""
    tokens = TokenMeasure(points) if mass is None else TokenMeasure(points, mass)
    case = Case(f"volume-{index}", layer, tokens)
    pairs = [(t, g) for t, g in itertools.product(threats(case), goals(case))]
    start = (7 * index) % len(pairs)
    return (Problem(layer, tokens, t, g) for t, g in pairs[start:] + pairs[:start])


def checked(method: CertificateMethod, problem: Problem, draw: Draw, index: int, *, ascend: bool) -> None:
    bound = method.prepare(problem, seed=index)
    size = (bound.first_guess or 1.0) * 10 ** draw.uniform(-1.0, 1.0)
    claimed = bound.usage(size).value
    if ascend:
        found = stress.largest_usage(problem, size, stress.Draw(index), count=4, steps=20)
    else:
        delta = problem.moves.project(100.0 * size * draw(16, *problem.clean.points.shape), size)
        delta = delta * torch.logspace(-2, 0, 16, dtype=torch.float64)[:, None, None]
        found = float(problem.usage(delta).max())
    assert found <= claimed * (1 + 1e-12) + 1e-12, f"{method.name}, {problem.threat.key}, {problem.goal.key}, {size}"


@amounts
@pytest.mark.parametrize("method", FOR_ATTENTION, ids=lambda method: method.name)
def test_certificates_of_attention(method: CertificateMethod, indices: range, ascend: bool) -> None:
    done = 0
    for index in indices:
        draw = Draw(50_000 + index)
        n = draw.integer(1, 7)
        layer = random_attention(draw, index, n)
        points = draw(n, layer.width, scale=10 ** draw.uniform(-0.5, 0.7))
        for problem in asked(layer, points, random_mass(draw, index, n), index):
            if method.refuses(problem) is None:
                checked(method, problem, draw, index, ascend=ascend)
                done += 1
                break
    assert done == len(indices)


@amounts
@pytest.mark.parametrize(("build", "method"), LAYERS, ids=[method.name for _, method in LAYERS])
def test_certificates_of_other_layers(
    build: Callable[..., Attention], method: CertificateMethod, indices: range, ascend: bool
) -> None:
    for index in indices:
        draw, layer = Draw(70_000 + index), build(index)
        n = draw.integer(1, 6)
        points = draw(n, layer.width, scale=10 ** draw.uniform(-1.0, 1.0))
        problem = next(p for p in asked(layer, points, None if method.name == "dasoulas2021-lipschitznorm" else
                                        random_mass(draw, index, n), index))  # fmt: skip
        assert method.refuses(problem) is None
        checked(method, problem, draw, index, ascend=ascend)


def dense(layer: TokenMap, points: Tensor, mass: Tensor | None) -> Tensor:
    """The derivative as a differentiable (n, e, n, d) array."""
    jacobian: Tensor = torch.func.jacrev(lambda x: layer(x, mass))(points)
    return jacobian


def spectral(jacobian: Tensor, mass: Tensor | None = None) -> Tensor:
    """Frobenius norm of the derivative, or its norm in W_2 of measures with these masses."""
    if mass is not None:
        jacobian = jacobian * mass.sqrt()[:, None, None, None] / mass.sqrt()[:, None]
    n, e, _, d = jacobian.shape
    norm: Tensor = torch.linalg.matrix_norm(jacobian.reshape(n * e, n * d), ord=2)
    return norm


def norm_at(layer: TokenMap, mass: Tensor | None, x: Tensor) -> Tensor:
    """Norm of the derivative at tokens x: in W_2 with masses, in l2 without."""
    return spectral(dense(layer, x, mass), mass)


Seen = Callable[[Tensor, float], None]


def climb(layer: TokenMap, mass: Tensor | None, start: Tensor, radius: float, *, ascend: bool, seen: Seen) -> None:
    """Ascend the norm of the derivative over tokens in a ball; ``seen`` gets every iterate."""
    x, steps = start, 12 if ascend else 0
    for step in range(steps + 1):
        x = x.detach().requires_grad_(steps > 0)
        now = norm_at(layer, mass, x)
        seen(x.detach(), float(now.detach()))
        if step == steps:
            return
        (gradient,) = torch.autograd.grad(now, x)
        if not bool(torch.isfinite(gradient).all()):  # equal singular values have no derivative
            return
        scale = torch.linalg.vector_norm(gradient, dim=-1).amax().clamp_min(1e-300)
        x = x.detach() + 0.3 * 0.9**step * radius * gradient / scale
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)
        x = x * (radius / length).clamp_max(1.0)


def in_ball(draw: Draw, n: int, d: int, radius: float) -> Tensor:
    points = draw(n, d, scale=radius)
    return points * (radius / torch.linalg.vector_norm(points, dim=-1, keepdim=True)).clamp_max(1.0)


@amounts
def test_local_norms(indices: range, ascend: bool) -> None:
    """At every input, random or on the way of an ascent of the norm, the local bounds hold; with masses the first."""
    for index in indices:
        draw = Draw(80_000 + index)
        n, radius = draw.integer(1, 5), 10 ** draw.uniform(-0.5, 0.5)
        layer, mass = random_attention(draw, index, n), random_mass(draw, index, n)

        def seen(x: Tensor, norm: float, layer: Attention = layer, mass: Tensor | None = mass) -> None:
            jacobian = AttentionJacobian(layer, x, mass)
            slack = 1e-10 * norm + 1e-12
            assert norm <= local_norm_upper(jacobian, mass=mass).value + slack
            if mass is None:
                assert norm <= softmax_norm_upper(jacobian).value + slack
                assert norm <= diameter_norm_upper(jacobian).value + slack

        climb(layer, mass, in_ball(draw, n, layer.width, radius), radius, ascend=ascend, seen=seen)


@amounts
def test_constants_on_balls(indices: range, ascend: bool) -> None:
    """Castin et al., reported and derived, for tokens (masks too) and for measures in W_1, W_2, W_inf; causal d_2."""
    for index in indices:
        draw = Draw(90_000 + index)
        n, radius = draw.integer(1, 5), 10 ** draw.uniform(-0.6, 0.2)
        layer = random_attention(draw, index, n)
        mass = torch.softmax(draw(n, scale=3.0), dim=0)
        tokens = [ball_constant(layer, n, radius, form=form).value for form in ("derived", "reported")]

        def moved(x: Tensor, norm: float, bounds: list[float] = tokens) -> None:
            assert norm <= min(bounds) * (1 + 1e-10)

        start = in_ball(draw, n, layer.width, radius)
        climb(layer, None, start, radius, ascend=ascend, seen=moved)
        if layer.mask is not None:
            continue
        if layer.causal:
            bounds = [masked_constant(layer, radius).value]
        else:
            bounds = [mean_field_constant(layer, radius, order=2.0, form=f).value for f in ("derived", "reported")]

        def split(x: Tensor, norm: float, bounds: list[float] = bounds, layer: Attention = layer,
                  mass: Tensor = mass, radius: float = radius) -> None:  # fmt: skip
            assert norm <= min(bounds) * (1 + 1e-10)
            if layer.causal:
                return
            jacobian = dense(layer, x, mass).detach()
            direction = torch.nn.functional.normalize(Draw(len(x))(x.shape[0], x.shape[1]), dim=-1)
            image = torch.einsum("iejd,jd->ie", jacobian, direction)
            largest = float(torch.linalg.vector_norm(image, dim=-1).max())  # one move of largest length 1
            single = torch.linalg.vector_norm(torch.einsum("iejd,jd->ije", jacobian, direction), dim=-1)
            first = float(((mass[:, None] * single).sum(dim=0) / mass).max())  # one token moves: W_1 to W_1
            for form in ("derived", "reported"):
                assert largest <= mean_field_constant(layer, radius, order=math.inf, form=form).value * (1 + 1e-10)
                assert first <= mean_field_constant(layer, radius, order=1.0, form=form).value * (1 + 1e-10)

        climb(layer, mass, start, radius, ascend=ascend, seen=split)


def gauss(x: Tensor, y: Tensor) -> Tensor:
    """``-|x_i - y_j|^2``."""
    return -(x[..., :, None, :] - y[..., None, :, :]).square().sum(dim=-1)


@amounts
def test_constants_of_kernels_and_sigmoids(indices: range, ascend: bool) -> None:
    """The general kernel -|x - y|^2 on a ball, and sigmoid attention, as maps of measures."""
    build = next(b for b, m in LAYERS if m.name == "sigmoid-ball")
    for index in indices:
        draw = Draw(95_000 + index)
        n, radius = draw.integer(1, 5), 10 ** draw.uniform(-0.6, 0.3)
        mass = torch.softmax(draw(n, scale=3.0), dim=0)
        # -|x - y|^2 on the ball: slopes 2|x - y| <= 4R, oscillation 4R^2, diameter 2R
        known = KernelConstants(
            diameter=2 * radius, oscillation=4 * radius**2, query_slope=4 * radius, key_slope=4 * radius
        )
        kernel = KernelAttention(gauss, "gauss", draw(2, 2), known)
        layer = build(index)
        for network, bound in ((kernel, kernel_constant(kernel, order=2.0)), (layer, sigmoid_constant(layer, radius))):

            def seen(x: Tensor, norm: float, bound: float = bound.value) -> None:
                assert norm <= bound * (1 + 1e-10)

            climb(network, mass, in_ball(draw, n, network.width, radius), radius, ascend=ascend, seen=seen)


@amounts
def test_softmax_constants(indices: range, ascend: bool) -> None:
    for index in indices:
        draw = Draw(99_000 + index)
        scores = draw(draw.integer(1, 12), scale=10 ** draw.uniform(-1, 1.3))
        for _ in range(20 if ascend else 1):
            scores = scores.detach().requires_grad_()
            weights = torch.softmax(scores, dim=0)
            norm = torch.linalg.matrix_norm(torch.diag(weights) - weights[:, None] * weights, ord=2)
            upper = float(derivative_norm_upper(weights.detach()))
            assert float(norm.detach()) <= upper * (1 + 1e-12) + 1e-15
            assert upper <= 0.5 + 1e-15
            ratio = norm / (weights.square().sum() + 1e-3)
            scores = scores.detach() + 0.5 * torch.autograd.grad(ratio, scores)[0]
