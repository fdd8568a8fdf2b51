"""The constant of cosine attention beside the published ones."""

import pytest
import torch

from attnrobust.certify.closed_form.cosine_lipschitz import CosineLipschitz
from attnrobust.certify.closed_form.cosine_lipschitz import reported_constant as cosine_reported
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.threats.moves import FrobeniusBall
from tests.seeded_variants import cosine, variant_problem


def test_cosine_constant_against_the_published_ones() -> None:
    """One head, n = 4, tau = 1, unit weights, eps = 1/4: derived 2 (2 * 2 + 1), published 2 * 28 and 2 * 38."""
    eye = torch.eye(3, dtype=torch.float64)[None]
    layer = CosineAttention(w_q=eye, w_k=eye, w_v=eye, tau=1.0, nu=1.0, eps=0.25)
    problem = variant_problem(layer, torch.randn(4, 3, dtype=torch.float64), FrobeniusBall(), Displacement(1.0))
    assert CosineLipschitz().prepare(problem, seed=0).usage(1.0).value == pytest.approx(2 * 5.0, rel=1e-9)
    assert cosine_reported(layer, 4).value == pytest.approx(2 * 28.0, rel=1e-9)
    assert cosine_reported(layer, 4, form="lipsformer").value == pytest.approx(2 * 38.0, rel=1e-9)
    with pytest.raises(InputError, match="one head"):
        cosine_reported(cosine(0), 4)
    with pytest.raises(InputError, match="form"):
        cosine_reported(layer, 4, form="printed")
