"""The constants of LipschitzNorm attention: where values dominate, and jointly in (Q, K, V)."""

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.dasoulas2021_lipschitznorm import (
    LipschitzNormGlobal,
    constant_through_joint,
    joint_constant,
)
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from tests.seeded_variants import variant_problem
from tests.stress import Draw, largest_usage


@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall()], ids=lambda threat: threat.key)
def test_lipschitznorm_where_values_dominate(threat: MoveThreat) -> None:
    """Tiny queries and keys: the layer averages values, and the bound is (e_n + 1) ||w_v|| with sqrt(n) < e here."""
    generator = torch.Generator().manual_seed(0)
    w_q, w_k, w_v = torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    layer = LipschitzNormAttention(w_q=1e-6 * w_q, w_k=1e-6 * w_k, w_v=w_v)
    points = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    problem = variant_problem(layer, points, threat, Displacement(1.0))
    found = largest_usage(problem, 0.1, Draw(0), steps=40)
    bound = LipschitzNormGlobal().prepare(problem, seed=0).usage(0.1).value
    assert found <= bound <= 3.6 * found


def test_lipschitznorm_joint_constant() -> None:
    """The derivative in (Q, K, V) at inputs of every proportion of the three norms."""

    def attend(joint: Tensor) -> Tensor:
        queries, keys, values = joint
        u, v, w = (
            torch.linalg.vector_norm(queries),
            *(torch.linalg.vector_norm(m, dim=-1).amax() for m in (keys, values)),
        )
        return torch.softmax(queries @ keys.T / torch.stack([u * v, u * w, v * w]).amax(), -1) @ values

    best, n = 0.0, 5
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        scales = 10 ** torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
        joint = scales * torch.randn(3, n, 2, generator=generator, dtype=torch.float64)
        matrix = torch.func.jacrev(attend)(joint).reshape(n * 2, -1)
        best = max(best, float(torch.linalg.matrix_norm(matrix, 2)))
    derived, reported = joint_constant(n).value, joint_constant(n, form="reported").value
    assert best <= derived <= 4.35 < reported
    assert reported == pytest.approx(10.55, abs=0.01)
    assert derived <= 4.0 * best
    with pytest.raises(InputError, match="form"):
        joint_constant(3, form="printed")


def test_lipschitznorm_constant_through_the_joint_one() -> None:
    """Tokens (q, k, v) carry over with norm 1, equal blocks with sqrt(3); heads side by side are stacked."""
    blocks = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2).permute(1, 0, 2)[:, None]
    joint = joint_constant(4).value
    apart = LipschitzNormAttention(w_q=blocks[0], w_k=blocks[1], w_v=blocks[2])
    assert constant_through_joint(apart, 4).value == pytest.approx(joint, rel=1e-9)
    same = LipschitzNormAttention(w_q=blocks[0], w_k=blocks[0], w_v=blocks[0])
    assert constant_through_joint(same, 4).value == pytest.approx(3**0.5 * joint, rel=1e-9)
    two = LipschitzNormAttention(**{w: torch.cat([blocks[0], blocks[0]]) for w in ("w_q", "w_k", "w_v")})
    assert constant_through_joint(two, 4).value == pytest.approx(6**0.5 * joint, rel=1e-9)
