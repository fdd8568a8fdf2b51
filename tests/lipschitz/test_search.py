"""The Lipschitz search: explicit lower bounds reached from random starts, exact answers, bad input."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_smooth import ball_constant
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.layers.attention import Attention
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.derivative import JacobianNorm, derivative_norm
from attnrobust.lipschitz.eigenvector_inputs import finite_lower, mean_field_lower
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.lipschitz.starts import LIGHTEST, Masses, eigenvector_inputs
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits, shapes_unchecked
from tests.cases import Case, case_named


def zeros(n: int, d: int = 1) -> Tensor:
    return torch.zeros(n, d, dtype=torch.float64)


def scaled_identity(a: float, d: int = 1) -> Attention:
    eye = torch.eye(d, dtype=torch.float64)[None]
    return Attention(w_q=a * eye, w_k=eye, w_v=eye, scale=1.0)


def l2_layer() -> L2Attention:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return L2Attention(w_q=one, w_v=one, scale=1.0)


def dense(case: Case) -> Tensor:
    return torch.func.jacrev(case.attention)(case.tokens.points, None if case.tokens.uniform else case.tokens.mass)


@pytest.mark.parametrize(("a", "d", "size"), [(-1.0, 1, 1.0), (-1.0, 3, 4.0), (8.0, 1, 2.0)])
def test_few_diracs_reach_the_explicit_bound_from_random_starts(a: float, d: int, size: float) -> None:
    """Masses free: at least e^g (1 + g) / 2, g = max(-a, a/8) R^2, by two atoms of unequal mass."""
    growth, top = max(-a, a / 8) * size, abs(a) * size
    found = lipschitz_search(
        scaled_identity(a, d), zeros(2, d), math.sqrt(size), masses="free", planted=False, steps=80, restarts=4
    )
    assert found.start == "random"
    assert_at_most(0.99 * 0.5 * (1 + growth) * math.exp(growth), found.lower.value)
    assert_at_most(found.lower.value, top + math.exp(top) * (1 + top))  # the derived W_2 upper bound
    assert_at_most(float(torch.linalg.vector_norm(found.tokens.points, dim=1).max()), math.sqrt(size), rtol=1e-12)


def test_free_masses_beat_equal_ones() -> None:
    equal, free = (
        lipschitz_search(scaled_identity(-1.0), zeros(2), 1.4, masses=m, planted=False, steps=80, restarts=2)
        for m in ("equal", "free")
    )
    assert equal.tokens.uniform
    assert not free.tokens.uniform
    assert_at_most(1.2 * equal.lower.value, free.lower.value)


@pytest.mark.parametrize("norm", ["linf", "max-token"])
def test_l2_attention_reaches_its_linf_constant(norm: JacobianNorm) -> None:
    """One head, width 1, ten tokens: the best row sum known is 4.393, the upper bound 5.404."""
    found = lipschitz_search(l2_layer(), zeros(10), 4.0, norm=norm, steps=100)
    assert_at_most(0.99 * 4.393, found.lower.value)
    assert_at_most(found.lower.value, 5.404)


@pytest.mark.slow
def test_l2_attention_reaches_its_linf_constant_with_a_hundred_tokens() -> None:
    """The best row sum known is 10.094, the upper bound 11.515."""
    found = lipschitz_search(l2_layer(), zeros(100), 4.0, norm="linf", steps=300)
    assert_at_most(0.99 * 10.094, found.lower.value)
    assert_at_most(found.lower.value, 11.515)


@pytest.mark.parametrize("masses", ["equal", "free"])
def test_planted_inputs_are_never_lost(masses: Masses) -> None:
    layer = case_named("plain-h2-n3-d4").attention
    found = lipschitz_search(layer, zeros(3, 4), 2.0, masses=masses, steps=20, restarts=1)
    known = finite_lower(layer, 3, 2.0) if masses == "equal" else mean_field_lower(layer, 2.0)
    assert_at_most(known.lower.value, found.lower.value, rtol=1e-6)  # one step of the ascent looks at it first
    if masses == "equal":
        assert_at_most(found.lower.value, ball_constant(layer, 3, 2.0).value)


def test_linear_layers_have_one_constant() -> None:
    case = case_named("uniform-w_q-zero")
    exact = float(torch.linalg.matrix_norm(dense(case).flatten(2).flatten(0, 1), ord=2))
    found = lipschitz_search(case.attention, case.tokens.points, 1.0, threat=FrobeniusBall(), steps=5, restarts=2)
    assert found.lower.value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["masses", "causal", "biases", "finite-mask"])
def test_norms_are_those_of_the_dense_derivative(name: str) -> None:
    case = case_named(name)
    jacobian, root = dense(case), case.tokens.mass.sqrt()
    weighted = (root[:, None, None, None] * jacobian / root[:, None]).flatten(2).flatten(0, 1)
    exact = float(torch.linalg.matrix_norm(weighted, ord=2))
    assert derivative_norm(case.attention, case.tokens).value == pytest.approx(exact, rel=1e-9)
    rows = float(jacobian.abs().sum(dim=(2, 3)).max())
    assert derivative_norm(case.attention, case.tokens, norm="linf").value == pytest.approx(rows, rel=1e-9)
    # sup over unit tokens v_j of |sum_j J_ij v_j|: between one block and the sum of a row's blocks
    blocks = torch.linalg.matrix_norm(jacobian.transpose(1, 2), ord=2)
    found = derivative_norm(case.attention, case.tokens, norm="max-token").value
    assert_at_most(float(blocks.max()), found, rtol=1e-9)
    assert_at_most(found, float(blocks.sum(dim=1).max()), rtol=1e-9)
    generator = torch.Generator().manual_seed(3)
    sampled = torch.randn(400, *case.tokens.points.shape, generator=generator, dtype=torch.float64)
    moved = torch.einsum("iejd,kjd->kie", jacobian, torch.nn.functional.normalize(sampled, dim=-1))
    assert_at_most(float(torch.linalg.vector_norm(moved, dim=-1).max()), found)


def test_only_chosen_tokens_leave_the_center() -> None:
    case = case_named("biases")
    found = lipschitz_search(
        case.attention, case.tokens.points, 0.5, threat=FrobeniusBall(tokens=(1,)), steps=4, restarts=2
    )
    moved = (found.tokens.points - case.tokens.points).abs().amax(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [1]


def test_networks_and_same_seed_same_result() -> None:
    case = case_named("causal")
    network = Network((Residual(case.attention),))
    first, second = (lipschitz_search(network, case.tokens.points, 0.5, steps=8, restarts=2, seed=4) for _ in range(2))
    assert first.lower == second.lower
    assert_same_bits(first.tokens.points, second.tokens.points)
    assert_at_most(0.9 * derivative_norm(network, TokenMeasure(case.tokens.points)).value, first.lower.value)


def test_bad_input_says_what_is_wrong() -> None:
    layer = scaled_identity(-1.0, 2)
    with pytest.raises(InputError, match="epsilon must be a positive number; got 0"):
        lipschitz_search(layer, zeros(2, 2), 0.0)
    with pytest.raises(InputError, match="restarts must be >= 1; got 0"):
        lipschitz_search(layer, zeros(2, 2), 1.0, restarts=0)
    with pytest.raises(InputError, match=r"center must have shape \(n, 2\); got \(2, 3\)"):
        lipschitz_search(layer, zeros(2, 3), 1.0)
    with pytest.raises(InputError, match="the center holds 1 NaN"):
        lipschitz_search(layer, torch.tensor([[0.0, math.nan]]).double(), 1.0)
    with shapes_unchecked(), pytest.raises(UnknownNameError, match="unknown norm 'l3'"):
        lipschitz_search(layer, zeros(2, 2), 1.0, norm="l3")  # type: ignore[arg-type]
    with shapes_unchecked(), pytest.raises(UnknownNameError, match="kind of masses 'some'"):
        lipschitz_search(layer, zeros(2, 2), 1.0, masses="some")  # type: ignore[arg-type]
    huge = scaled_identity(1e200, 2)
    with pytest.raises(InputError, match="no start gave a finite derivative"):
        lipschitz_search(huge, zeros(2, 2) + 1e200, 1e199, planted=False, restarts=2, steps=2)


def test_an_atom_of_a_start_whose_mass_underflows_does_not_end_the_search() -> None:
    eye = torch.eye(2, dtype=torch.float64)[None]
    layer = Attention(w_q=eye, w_k=eye, w_v=eye)
    assert min(float(logits.min()) for _, logits in eigenvector_inputs(layer, 3, 20.0, "free")) == LIGHTEST
    result = lipschitz_search(layer, torch.zeros(3, 2, dtype=torch.float64), epsilon=20.0, masses="free", steps=4)
    assert 0.0 < result.lower.value < math.inf


def test_fixed_masses_stand_for_equal_tokens() -> None:
    """Atoms of masses 1/4 and 3/4 are one token against three: the four tokens' derivative is at least as large."""
    w = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    layer = Attention(w_q=w[0], w_k=w[1], w_v=w[2])
    mass = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = lipschitz_search(layer, torch.zeros(2, 3, dtype=torch.float64), 1.0, masses=mass, restarts=2, steps=10)
    assert_close(found.tokens.mass, mass, rtol=1e-15)
    four = TokenMeasure(found.tokens.points[[0, 1, 1, 1]])
    norm = derivative_norm(layer, four).value
    assert found.lower.value <= norm * (1.0 + 1e-9)
    with pytest.raises(UnknownNameError, match="masses"):
        lipschitz_search(layer, four.points, 1.0, masses="fixed")
