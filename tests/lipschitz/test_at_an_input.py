"""The closed-form local bound: above the norm on every case, attained where it must be, correct under masses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.lipschitz.at_an_input import diameter_norm_upper, local_norm_upper, softmax_norm_upper
from tests.cases import Case, case_named, cases

BOUNDS = (local_norm_upper, softmax_norm_upper, diameter_norm_upper)


def _matrix(jacobian: AttentionJacobian) -> Tensor:
    return jacobian.linear_map().dense()


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _jacobian(case: Case) -> AttentionJacobian:
    return AttentionJacobian(case.attention, case.tokens.points, None if case.tokens.uniform else case.tokens.mass)


@pytest.mark.one_in(3)
def test_never_below_the_norm(every_case: Case) -> None:
    jacobian = _jacobian(every_case)
    for bound in BOUNDS:
        assert _norm(_matrix(jacobian)) <= bound(jacobian).value


def test_weighted_norm_for_measures(every_case: Case) -> None:
    jacobian, root = _jacobian(every_case), every_case.tokens.mass.sqrt()
    rows = root.repeat_interleave(every_case.attention.out_width)
    weighted = rows[:, None] * _matrix(jacobian) / root.repeat_interleave(every_case.attention.width)
    assert _norm(weighted) <= local_norm_upper(jacobian, mass=every_case.tokens.mass).value


def test_random_layers_and_scales() -> None:
    """Heads without output projection, one at a time: ratio at least 1 and never absurd."""
    generator = torch.Generator().manual_seed(0)
    ratios: list[list[float]] = []

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(150):
        n, d = int(torch.randint(1, 9, (), generator=generator)), int(torch.randint(1, 5, (), generator=generator))
        layer = Attention(w_q=draw(1, d, d), w_k=draw(1, d, d), w_v=draw(1, d, d), b_q=draw(1, d))
        jacobian = AttentionJacobian(layer, draw(n, d) * 10 ** float(draw(1)))
        ratios.append([bound(jacobian).value / _norm(_matrix(jacobian)) for bound in BOUNDS])
    table = torch.tensor(ratios)
    assert bool((table >= 1.0).all())
    medians = table.median(dim=0).values.tolist()
    assert medians[0] < 2.2, "the documented typical ratio is 1.6"
    assert medians[0] < medians[1] < 4.0


@pytest.mark.parametrize("heads", [1, 3])
def test_exact_where_the_scores_do_not_move(heads: int) -> None:
    """W_q = 0: f = P X W_v with fixed P; for one head and concatenated equal heads the bound is the norm."""
    case = case_named("uniform-w_q-zero")
    w_v = case.attention.w_v[:1].expand(heads, -1, -1)
    zero = torch.zeros(heads, 4, 2, dtype=torch.float64)
    jacobian = AttentionJacobian(Attention(w_q=zero, w_k=zero, w_v=w_v), case.tokens.points)
    assert local_norm_upper(jacobian).value == pytest.approx(_norm(_matrix(jacobian)), rel=1e-6)


def test_scales_with_the_values() -> None:
    for case in cases(max_n=6):
        jacobian = _jacobian(case)
        larger = replace(case.attention, w_v=3.0 * case.attention.w_v)
        scaled = local_norm_upper(replace(jacobian, attention=larger)).value
        assert scaled == pytest.approx(3.0 * local_norm_upper(jacobian).value, rel=1e-6)


def test_batches_are_refused() -> None:
    case = case_named("causal")
    batch = AttentionJacobian(case.attention, case.tokens.points.expand(2, -1, -1))
    for bound in BOUNDS:
        with pytest.raises(InputError, match="not a batch"):
            bound(batch)
