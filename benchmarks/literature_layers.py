"""Tightness of the bounds of the other attention layers, and of single rows, limits and lower bounds.

Part of ``python -m benchmarks.literature_tightness``.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import kernel_constant
from attnrobust.certify.closed_form.castin2024_smooth import ball_constant, large_radius_limit
from attnrobust.certify.closed_form.dasoulas2021_lipschitznorm import joint_constant
from attnrobust.certify.closed_form.kim2021_l2 import reported_constant
from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_constant
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.at_an_input import local_norm_upper
from attnrobust.lipschitz.table import Quantity, bounds_table
from attnrobust.threats.moves import PerTokenBall
from benchmarks.literature_tightness import (
    STARTS,
    Row,
    ascend,
    into_ball,
    largest_norm,
    largest_weighted,
    norms,
    random_layer,
    ratios,
    scalar_layer,
)
from tests.eigenvector_lower import eigenvector_lower

SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Radii of the starts where a constant holds on all of space."""


def largest_anywhere(layer: TokenMap, n: int) -> float:
    """Largest derivative norm found, from starts of every size."""
    generator = torch.Generator().manual_seed(0)
    best = 0.0
    for scale in SCALES:
        start = scale * torch.randn(STARTS, n, layer.width, generator=generator, dtype=torch.float64)
        best = max(best, ascend(norms(layer), start, partial(into_ball, radius=10.0 * scale), 0.3 * scale))
    return best


def table_ratios(layers: list[TokenMap], n: int) -> dict[str, list[float]]:
    """Every constant of all of space over the largest norm found, by name."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        largest = largest_anywhere(layer, n)
        for row in bounds_table(layer, n=n, radius=1.0, search=0).bounds:
            if row.quantity == Quantity.BALL:
                found.setdefault(row.name, []).append(row.value / largest)
    return found


def weights(seed: int, heads: int, width: int) -> Tensor:
    """Gaussian weights of queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, width, width // heads, generator=generator, dtype=torch.float64)


def other_rows() -> Iterator[Row]:
    """Sections 12 to 15 of the proofs."""
    drawn = [weights(seed, 2, 4) for seed in range(3)]
    found = table_ratios([L2Attention(w_q=w[0], w_v=w[2]) for w in drawn], 4)
    yield "L2 attention, derived", "2 heads, d = 4, n = 4", ratios(found["kim2021-l2"]), ""
    yield "L2 attention, reported (exponent repaired)", "the same", ratios(found["kim2021-l2-reported"]), "3.8 - 33"
    texts = [
        f"{reported_constant(scalar_l2(), n, norm='linf').value / largest_entry_row(n):.3f}" for n in (10, 100, 1000)
    ]
    yield "L2 attention, reported, largest entry", "width 1, n = 10, 100, 1000", ", ".join(texts), "1.23, 1.14, 1.095"
    before = {
        "cosine-lipschitz": ("3.3", "6.1"),
        "cosine-reported-nair": ("16", "104"),
        "cosine-reported-lipsformer": ("24", "204"),
    }
    for place, (n, tau) in enumerate(((4, 1.0), (8, 5.0))):
        drawn = [weights(seed, 1, 3) for seed in range(2)]
        layers = [CosineAttention(w_q=w[0], w_k=w[1], w_v=w[2], tau=tau, eps=0.1) for w in drawn]
        for name, values in table_ratios(list(layers), n).items():
            setting = f"one head, n = {n}, tau = {tau:g}"
            yield f"cosine attention, {name}", setting, ratios(values), before[name][place]
    largest = largest_anywhere(joint_layer(), 4)
    joint = [joint_constant(4, form=form).value / largest for form in ("reported", "derived")]
    yield "LipschitzNorm, reported", "jointly in (Q, K, V), n = 4", ratios(joint[:1]), "6.9 - 7.9"
    yield "LipschitzNorm, derived", "jointly in (Q, K, V), n = 4", ratios(joint[1:]), ""
    values = []
    for strength in (0.1, 1.0, 4.0):
        w = weights(0, 1, 2)
        layer = SigmoidAttention(w_q=w[0], w_k=w[1], w_v=w[2], scale=1.0)
        radius = math.sqrt(strength / float(torch.linalg.matrix_norm(w[0, 0] @ w[1, 0].T, 2)))
        start = radius * torch.randn(STARTS, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        largest = ascend(norms(layer), start, partial(into_ball, radius=radius), 0.3 * radius)
        values.append(sigmoid_constant(layer, radius).value / largest)
    yield "sigmoid attention, measures", "one head, n = 6 equal masses, a = .1, 1, 4", ratios(values), "1.02 - 2.4"


def scalar_l2() -> L2Attention:
    """Width 1, weights 1."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return L2Attention(w_q=one, w_v=one, scale=1.0)


def largest_entry_row(n: int) -> float:
    """Largest sum of absolute derivatives of the first output; its token at 0, the others at +-t, t on a grid."""
    best, signs = 0.0, torch.ones(n, 1, dtype=torch.float64)
    signs[::2] = -1.0
    signs[0] = 0.0
    for t in torch.linspace(0.5, 3.5, 301, dtype=torch.float64):
        x = (t * signs).requires_grad_()
        (gradient,) = torch.autograd.grad(scalar_l2()(x)[0, 0], x)
        best = max(best, float(gradient.abs().sum()))
    return best


def joint_layer() -> LipschitzNormAttention:
    """Tokens (q, k, v) of width 2 each: its constant is the joint one in (Q, K, V)."""
    blocks = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2).permute(1, 0, 2)[:, None]
    return LipschitzNormAttention(w_q=blocks[0], w_k=blocks[1], w_v=blocks[2])


def more_rows() -> Iterator[Row]:
    """Single rows, weighted local bounds, the limit, lower bounds, the general kernel, the softmax constant."""
    values = []
    for strength in (0.1, 1.0, 4.0):
        layer = random_layer(1)
        radius = math.sqrt(strength / float(torch.linalg.matrix_norm(layer.bilinear[0], 2)))
        value = ball_constant(layer, 8, radius, threat=PerTokenBall(), pool="mean").value
        values.append(value / largest_norm(layer, 8, radius, pool="row"))
    yield "ball, derived", "one row of 8, a = .1, 1, 4", ratios(values), "1.5 - 2.3"
    for form, before in (("reported", "2.28 - 5.09"), ("derived", "1.51 - 2.94")):
        values = []
        for strength in (0.1, 1.0, 4.0):
            radius, layer = math.sqrt(strength), scalar_layer(-1.0)
            values += [
                ball_constant(layer, n, radius, form=form).value / largest_norm(layer, n, radius) for n in (2, 8)
            ]
        yield f"ball, {form}", "width 1, A = -1, n = 2, 8, a = .1, 1, 4", ratios(values), before
    for sign, before in ((-1.0, "1.00 - 2.0"), (1.0, "1.5 - 7.9")):
        values = []
        for size in (0.25, 1.0, 4.0):
            layer, radius = scalar_layer(sign), math.sqrt(size)
            values += [largest_norm(layer, n, radius) / eigenvector_lower(layer, radius, n=n) for n in (2, 8)]
        yield "ball, lower bound (found / bound)", f"width 1, A = {sign:+.0f}, n = 2, 8", ratios(values), before
    yield "local, covariances, weighted", "300 random inputs and masses", weighted_local(), "min 1.0, median 1.65"
    layer, values = random_layer(0), []
    for seed in range(8):
        points = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        far = float(torch.linalg.matrix_norm(AttentionJacobian(layer, 300.0 * points).linear_map().dense(), 2))
        values.append(large_radius_limit(layer, points).value / far)
    yield "large-radius limit (at 300 X)", "one head, n = 3", ratios(values), "1.00"
    values = []
    for size in (0.25, 1.0, 2.0):
        radius = math.sqrt(size)
        known = KernelConstants(diameter=2 * radius, oscillation=2 * size, query_slope=radius, key_slope=radius)
        kernel = KernelAttention(lambda x, y: x @ y.mT, "dot", torch.ones(1, 1, dtype=torch.float64), known)
        values.append(kernel_constant(kernel, order=1.0).value / largest_weighted(1.0, radius, 1.0))
    yield "general kernel, measures", "W_1, s = x y on [-R, R], R^2 = .25, 1, 2", ratios(values), ""
    exact = []
    for n in (2, 10, 1000):
        p = torch.softmax(torch.tensor([math.log(n - 1.0)] + [0.0] * (n - 1), dtype=torch.float64), 0)
        exact.append(0.5 / float((torch.diag(p) - p[:, None] * p).abs().sum(dim=1).max()))
    yield "softmax, 1/2 in l_1 and l_inf", "n = 2, 10, 1000, one peak of weight 1/2", ratios(exact), "1"


def weighted_local() -> str:
    """The mass-weighted local bound over the exact norm."""
    generator, collected = torch.Generator().manual_seed(2), []
    for seed in range(300):
        n = int(torch.randint(2, 10, (), generator=generator))
        points = 10 ** float(torch.randn((), generator=generator)) * torch.randn(
            n, 2, generator=generator, dtype=torch.float64
        )
        mass = torch.softmax(2 * torch.randn(n, generator=generator, dtype=torch.float64), 0)
        jacobian = AttentionJacobian(random_layer(seed), points, mass)
        root = mass.sqrt().repeat_interleave(2)
        weighted = root[:, None] * jacobian.linear_map().dense() / root
        value = local_norm_upper(jacobian, mass=mass).value
        collected.append(value / float(torch.linalg.matrix_norm(weighted, 2)))
    ordered = sorted(collected)
    return f"min {ordered[0]:.2f}, median {ordered[150]:.2f}"
