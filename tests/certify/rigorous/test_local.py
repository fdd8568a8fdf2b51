"""Ball arithmetic: enclosures, norms, and the certificate that is rounded outward end to end."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

from attnrobust.attacks import attack
from attnrobust.certify.radius import LARGEST
from attnrobust.certify.rigorous.local import RigorousLocal, estimated_seconds, visible_keys
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics import balls as rigorous
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall, TokenNorm
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, refused
from tests.cases import Case, case_named, cases, problems

pytest.importorskip("flint")
METHOD = RigorousLocal()
NORMS: tuple[TokenNorm, ...] = ("l2", "linf", "l1")


def exact_norm_2x2(rows: list[list[float]]) -> Decimal:
    """Largest singular value of a 2 x 2 matrix to 60 digits: s^2 = (t + sqrt(t^2 - 4 det^2)) / 2, t = ||A||_F^2."""
    with localcontext() as context:
        context.prec = 400
        (a, b), (c, d) = ((Decimal(x) for x in row) for row in rows)
        t, det = a * a + b * b + c * c + d * d, a * d - b * c
        return ((t + max(t * t - 4 * det * det, Decimal(0)).sqrt()) / 2).sqrt()


def test_floats_leave_a_ball_on_the_right_side() -> None:
    with rigorous.precision():
        third = rigorous.ball(1.0) / 3
        assert Fraction(-rigorous.upper_float(-third)) < Fraction(1, 3) < Fraction(rigorous.upper_float(third))
        assert rigorous.upper_float(rigorous.ball(1e308) * 1e10) == math.inf
        assert rigorous.upper_float(rigorous.ball(0.25)) == 0.25


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_rigorous_norm_is_above_the_exact_one_by_almost_nothing(size: float) -> None:
    rows = [[size, 2 * size], [3 * size, -size]]
    result = rigorous.spectral_norm_rigorous(torch.tensor(rows, dtype=torch.float64))
    exact = float(exact_norm_2x2(rows))
    assert_at_most(exact * (1 - 1e-15), result.value)
    assert result.value == pytest.approx(exact, rel=1e-3)


def test_rigorous_norm_of_rank_one_is_above_the_product_of_lengths() -> None:
    # Rank one: the powers are exact up to the balls' errors, so the rigorous value is the norm itself.
    draw = torch.Generator().manual_seed(5)
    for _ in range(50):
        left, right = (torch.randint(-99, 99, (size,), generator=draw).to(torch.float64) for size in (6, 4))
        norm = rigorous.spectral_norm_rigorous(torch.outer(left, right)).value
        exact = float(torch.linalg.vector_norm(left)) * float(torch.linalg.vector_norm(right))
        assert_at_most(exact * (1 - 1e-14), norm)


@pytest.mark.parametrize("shape", [(9, 9, 2), (2, 9, 5), (9, 2, 5), (6, 6, 6)])
def test_norm_of_a_product_through_its_small_side(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    left, right = torch.randn(m, k, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    true = float(torch.linalg.svdvals(left @ right.T)[0])
    with rigorous.precision():
        value = rigorous.upper_float(
            rigorous.spectral_of_product(rigorous.ball_matrix(left), rigorous.ball_matrix(right))
        )
    assert_at_most(true * (1 - 1e-12), value)
    assert_at_most(value, true * 1.02)


def test_softmax_holds_the_true_weights_and_exact_zeros() -> None:
    scores = torch.tensor([[0.0, 1.0, -math.inf], [700.0, -700.0, 3.0]], dtype=torch.float64)
    visible = ~torch.isneginf(scores)
    with rigorous.precision():
        balls = rigorous.softmax_rows(rigorous.ball_matrix(scores.masked_fill(~visible, 0.0)), visible).tolist()
        for row, expected in zip(balls, torch.softmax(scores, dim=-1).tolist(), strict=True):
            for entry, value in zip(row, expected, strict=True):
                assert -rigorous.upper_float(-entry) <= value * (1 + 1e-12)
                assert value <= rigorous.upper_float(entry) * (1 + 1e-12)
                assert rigorous.upper_float(entry) + rigorous.upper_float(-entry) < 1e-15


def test_a_missing_extra_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigorous, "available", lambda: False)
    with refused(InputError, "pip install"):
        rigorous.spectral_norm_rigorous(torch.eye(2, dtype=torch.float64))
    assert METHOD.refuses(next(problems(case_named("biases")))) == rigorous.CURE


def test_precision_ends_with_the_block() -> None:
    import flint

    before = flint.ctx.prec
    with rigorous.precision(300):
        assert flint.ctx.prec == 300
    assert flint.ctx.prec == before


# ---- the certificate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(max_n=6), ids=lambda case: case.name)
@pytest.mark.one_in(4)
def test_no_attack_inside_the_certified_radius(case: Case) -> None:
    for index, problem in enumerate(problems(case)):
        if (index + case.n) % 3:
            continue  # a third of the pairs of each case; all shapes of threat and goal occur over the table
        assert METHOD.refuses(problem) is None
        certificate = METHOD.certify(problem)
        assert certificate.kind is Kind.RIGOROUS
        assert certificate.failure_probability == 0.0
        assert certificate.radius > 0
        assert_at_most(certificate.radius, min(attack(problem, seed=1).radius, LARGEST))


@pytest.mark.parametrize("case", cases(max_n=8), ids=lambda case: case.name)
@pytest.mark.one_in(4)
def test_bound_holds_at_sampled_moves_of_every_size(case: Case) -> None:
    draw = torch.Generator().manual_seed(11)
    for problem in problems(case):
        bound = METHOD.prepare(problem, seed=0)
        for radius in (1e-3, 0.3, 5.0):
            noise = torch.randn(32, *problem.clean.points.shape, generator=draw, dtype=torch.float64)
            moves = problem.moves.project(1e3 * noise, radius * (1 - 1e-12))
            upper = bound.usage(radius)
            assert isinstance(upper, Upper)
            assert_at_most(float(problem.usage(moves).max()), upper.value + 1e-13, rtol=1e-9)


def test_exact_for_one_token_without_biases() -> None:
    # One token: f(x) = x w_v w_o, the worst move is along the top singular vector and the bound is sharp.
    eye, values = torch.eye(3)[None], torch.diag(torch.tensor([3.0, 1.0, 0.5]))[None]
    layer = Attention(w_q=eye, w_k=eye, w_v=values)
    problem = Problem(layer, TokenMeasure(torch.ones(1, 3)), FrobeniusBall(), Displacement(1.0))
    certificate = METHOD.certify(problem)
    assert certificate.radius <= 1 / 3
    assert certificate.radius == pytest.approx(1 / 3, rel=5e-3)


def test_the_score_change_of_second_order_counts() -> None:
    # At X = 0 the scores change by delta_i A delta_j alone; two tokens that move together draw all attention.
    eye = torch.eye(2)[None]
    layer = Attention(w_q=5 * eye, w_k=eye, w_v=eye, scale=1.0)
    problem = Problem(layer, TokenMeasure(torch.zeros(6, 2)), FrobeniusBall(), Displacement(1.0, pool=0))
    move = torch.zeros(6, 2, dtype=torch.float64)
    move[:2, 0] = 2.0**0.5
    used = float(problem.usage(move))
    assert used > 2 * 2 / 6**0.5 * 0.7  # well past the first-order value rho ||P_0||
    assert_at_most(used, METHOD.prepare(problem, seed=0).usage(2.0).value)
    assert METHOD.prepare(problem, seed=0).usage(1e-3).value == pytest.approx(1e-3 / 6**0.5, rel=1e-3)


def test_uniform_attention_leaves_the_value_path_alone() -> None:
    # W_q = 0: f_i = mean(x) V, ||P||_2 = 1, so ||f(X') - f(X)||_F <= ||V|| rho, attained.
    layer = Attention(w_q=torch.zeros(1, 2, 2), w_k=torch.eye(2)[None], w_v=2 * torch.eye(2)[None])
    problem = Problem(layer, TokenMeasure(torch.randn(5, 2)), FrobeniusBall(), Displacement(1.0))
    assert METHOD.certify(problem).radius == pytest.approx(0.5, rel=5e-3)


def test_hidden_tokens_do_not_count() -> None:
    case = case_named("padding")
    far = case.tokens.points.clone()
    far[-3:] *= 1e3  # the last three tokens are hidden from every query
    for goal in (Displacement(0.1, pool=0), Margin(weight=torch.eye(4)[:2], pool=0, label=None)):
        near_radius = METHOD.certify(Problem(case.attention, case.tokens, FrobeniusBall(), goal)).radius
        far_radius = METHOD.certify(Problem(case.attention, TokenMeasure(far), FrobeniusBall(), goal)).radius
        assert far_radius == pytest.approx(near_radius, rel=5e-3)


def test_hidden_keys_follow_mask_and_causality() -> None:
    assert visible_keys(case_named("causal").attention, 7).sum() == 28
    assert visible_keys(case_named("padding-causal").attention, 6)[:, -2:].sum() == 0


def test_a_layer_too_large_is_refused_with_the_time_it_would_take() -> None:
    zero = torch.zeros(2, 4, 3)
    layer = Attention(w_q=zero, w_k=zero, w_v=torch.ones(2, 4, 3))
    problem = Problem(layer, TokenMeasure(torch.ones(2000, 4)), FrobeniusBall(), Displacement(1.0))
    assert estimated_seconds(layer, 2000) > 100
    reason = METHOD.refuses(problem)
    assert reason is not None
    assert "ball arithmetic would take about" in reason


def test_token_norms_have_their_exact_enclosing_factor() -> None:
    case = case_named("wide-tokens")
    radii = {
        norm: METHOD.certify(Problem(case.attention, case.tokens, PerTokenBall(norm=norm), Displacement(0.1))).radius
        for norm in NORMS
    }
    assert radii["l1"] == radii["l2"]
    assert radii["linf"] == pytest.approx(radii["l2"] / 24**0.5, rel=5e-3)
