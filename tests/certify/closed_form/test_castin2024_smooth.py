"""The Lipschitz constant of Castin et al. on a ball: against Jacobian norms, sampling and its closed forms."""

import math
from dataclasses import replace

import pytest
import torch

from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from tests.cases import Case, case_named, cases


@pytest.mark.parametrize("form", ["derived", "reported"])
@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0])
@pytest.mark.one_in(2)
def test_ball_constant_against_jacobian_norms(form: str, strength: float) -> None:
    """Gradient ascent of the exact Jacobian norm over the ball stays below the constant and comes close to it."""
    ratios = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
        layer = Attention(w_q=weights[0], w_k=weights[1], w_v=weights[2], scale=1.0, causal=seed % 2 == 1)
        radius = math.sqrt(strength / float(torch.linalg.matrix_norm(layer.bilinear[0], 2)))
        found = _largest_norm(layer, radius, n=4, generator=generator)
        constant = ball_constant(layer, 4, radius, form=form).value
        assert found <= constant
        ratios.append(constant / found)
    assert min(ratios) < 6.0, "the constants are known to be within a factor of about 2 to 5 here"


def _largest_norm(layer: Attention, radius: float, *, n: int, generator: torch.Generator) -> float:
    x = radius * torch.nn.functional.normalize(torch.randn(8, n, 2, generator=generator, dtype=torch.float64), dim=-1)
    jacobian = torch.func.vmap(torch.func.jacrev(layer))
    best = 0.0
    for _ in range(40):
        x = x.detach().requires_grad_()
        norms = torch.linalg.matrix_norm(jacobian(x).flatten(1, 2).flatten(2), 2)
        best = max(best, float(norms.detach().max()))
        (gradient,) = torch.autograd.grad(norms.sum(), x)
        step = gradient / torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True).clamp_min(1e-300)
        x = x.detach() + 0.1 * radius * step
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = x * (radius / length).clamp_max(1.0)
    return best


@pytest.mark.parametrize("case", cases(max_n=8), ids=lambda case: case.name)
@pytest.mark.one_in(4)
def test_ball_constant_in_other_norms(case: Case) -> None:
    """One token and the mean: sampled difference quotients on the ball, masses and masks of the case included."""
    radius = 1.5
    generator = torch.Generator().manual_seed(1)
    mass = None if case.tokens.uniform else case.tokens.mass
    pairs = torch.randn(2, 64, case.n, case.attention.width, generator=generator, dtype=torch.float64)
    pairs = radius * torch.nn.functional.normalize(pairs, dim=-1)
    pairs[1, ::2] = pairs[0, ::2] + 1e-3 * (pairs[1, ::2] - pairs[0, ::2])  # half of the pairs are close
    change = case.attention(pairs[0], mass) - case.attention(pairs[1], mass)
    move = pairs[0] - pairs[1]
    tokens = torch.linalg.vector_norm(move, dim=-1).amax(dim=-1)
    total = torch.linalg.vector_norm(move, dim=(-2, -1))
    pooled = torch.linalg.vector_norm(change.mean(dim=1), dim=-1)
    largest = torch.linalg.vector_norm(change, dim=(-2, -1))
    for form in ("derived", "reported"):
        for threat, size in ((FrobeniusBall(), total), (PerTokenBall(), tokens)):
            full = ball_constant(case.attention, case.n, radius, form=form, threat=threat)
            mean = ball_constant(case.attention, case.n, radius, form=form, threat=threat, pool="mean")
            assert bool(
                (largest <= size * full.value + 1e-14).all()
            )  # W_v = 0: the constant is 0, the change is rounding
            assert bool((pooled <= size * mean.value + 1e-14).all())


def test_ball_constant_refuses_nonsense() -> None:
    layer = case_named("biases").attention
    for radius, form, pool in ((1.0, "printed", "all"), (-1.0, "derived", "all"), (1.0, "derived", "max")):
        with pytest.raises(InputError, match="give a radius"):
            ball_constant(layer, 3, radius, form=form, pool=pool)


def test_closed_forms_for_one_head() -> None:
    """The constants as they stand in the docs."""
    layer = replace(case_named("concatenated-biases-one-head").attention, b_q=None)
    n, radius = 5, 0.7
    a = float(torch.linalg.matrix_norm(layer.bilinear[0], 2)) * radius**2
    v = float(torch.linalg.matrix_norm(layer.w_v[0], 2))
    reported = math.sqrt(3) * v * math.sqrt(a**2 * (4 * n + 1) + n)
    derived = v * (math.sqrt(n) * (1 + a) + a)
    assert ball_constant(layer, n, radius, form="reported").value == pytest.approx(reported, rel=1e-9)
    assert ball_constant(layer, n, radius).value == pytest.approx(derived, rel=1e-9)
    assert ball_constant(layer, n, radius, pool="mean").value == pytest.approx(v * (1 + a + a / math.sqrt(n)), rel=1e-9)
    per_token = ball_constant(layer, n, radius, threat=PerTokenBall()).value
    assert per_token == pytest.approx(math.sqrt(n) * v * (1 + 2 * a), rel=1e-9)
