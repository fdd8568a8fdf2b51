"""The sphere's lemma at single tokens, on fine grids of the plane that it reduces to."""

import math

import pytest
import torch

from attnrobust.certify.network.node_bounds.normalise import NormaliseBound, remainder_curvature
from attnrobust.certify.network.node_bounds.state_move import state_move, token_move
from attnrobust.layers.normalisation import LayerNorm, RMSNorm


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_curvature_of_the_sphere_is_bounded_and_nearly_reached(share: float) -> None:
    angle = torch.linspace(0.0, 2.0 * math.pi, 2001, dtype=torch.float64)
    along, across = share * angle.cos(), share * angle.sin()
    length = torch.hypot(1.0 + along, across)
    # 1/length - 1 without cancellation
    shift = -(2.0 * along + share**2) / (length * (1.0 + length))
    rest = torch.hypot((1.0 + along) * shift + along, across * shift)
    bound = share**2 * float(remainder_curvature(torch.tensor([share], dtype=torch.float64))[0])
    assert float(rest.max()) <= bound * (1 + 1e-6)
    assert float(rest.max()) >= 0.6 * bound


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1e3])
def test_moves_never_exceed_the_sphere(kind: type[LayerNorm], eps: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64)
    norm = kind(torch.randn(5, dtype=torch.float64), None, eps)
    bound = NormaliseBound(norm, x)
    far = bound.move(token_move(math.inf, torch.full((2,), math.inf, dtype=torch.float64), 5))
    limit = 2.0 * math.sqrt(5.0) * float(norm.weight.abs().max())
    assert float(far.tokens.max()) <= limit * (1 + 1e-9)
    opposite = norm(-1e9 * x) - norm(x)
    assert bool((torch.linalg.vector_norm(opposite, dim=-1) <= far.tokens).all())


def test_a_bound_of_scaled_tokens_is_used() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64) * torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)[:, None]
    bound = NormaliseBound(LayerNorm(torch.ones(6, dtype=torch.float64)), x)
    factors = bound.spread.min() / bound.spread
    tokens = 0.01 / factors
    entries = tokens[:, None].expand(-1, 6)
    plain = state_move(1.0, tokens, entries)
    scaled = state_move(1.0, tokens, entries, scaled=(factors, 0.01))
    assert bound.move(scaled).frobenius < 0.7 * bound.move(plain).frobenius
    cotangents = torch.randn(1, 3, 6, dtype=torch.float64)
    assert float(bound.readout(cotangents, scaled)) < 0.9 * float(bound.readout(cotangents, plain))
