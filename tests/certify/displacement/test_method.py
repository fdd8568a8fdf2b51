"""The displacement certificate as a whole: remainders, displacements under attack, exact answers, refusals."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.displacement.method import DisplacementBound, DisplacementCertificate
from attnrobust.certify.displacement.remainder import RemainderMajorant
from attnrobust.certify.registry import METHODS
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin, Pool
from attnrobust.layers.attention import Attention
from attnrobust.numerics.eigenvalues import power_eigenvalue
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.cases import case_named
from tests.displacement_tools import SMALL_CASES, clean_rows, dense_forms, form_root, with_marks, worst_ratio

METHOD = DisplacementCertificate()
THREATS: tuple[MoveThreat, ...] = (
    FrobeniusBall(), FrobeniusBall(tokens=(0,)), PerTokenBall(), PerTokenBall(norm="linf"), PerTokenBall(norm="l1"),
    AnyToken(),
)  # fmt: skip


def _problem(name: str, threat: MoveThreat, goal: Goal) -> Problem:
    case = case_named(name)
    return Problem(case.attention, case.tokens, threat, goal)


def _ascend(problem: Problem, radius: float, *, steps: int = 40, count: int = 12) -> float:
    """Largest usage found inside the threat's set of this radius."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, *problem.clean.points.shape)
    moves = problem.moves.project(torch.randn(shape, generator=generator, dtype=torch.float64) * radius, radius)
    worst = 0.0
    for step in range(steps):
        moves = moves.detach().requires_grad_()
        usage = problem.usage(moves)
        worst = max(worst, float(usage.detach().max()))
        (gradient,) = torch.autograd.grad(usage.sum(), moves)
        share = 0.5 if step < steps // 2 else 0.1
        moves = problem.moves.project(moves.detach() + share * radius * problem.moves.steepest(gradient), radius)
    return worst


@pytest.mark.parametrize("name", with_marks((name,) for name in SMALL_CASES))
@pytest.mark.parametrize("pool", ["all", 0])
@pytest.mark.one_in(2)
def test_displacement_stays_below_the_bound(name: str, pool: Pool) -> None:
    problem = _problem(name, FrobeniusBall(), Displacement(1.0, pool=pool))
    bound = DisplacementBound(problem, 0)
    rows = clean_rows(name, pool=pool)
    for radius in (0.1, 1.5):
        usage = bound.usage(radius).value

        def ratio(moves: Tensor, usage: float = usage) -> Tensor:
            return problem.usage(moves) / (usage + 1e-12)

        assert worst_ratio(rows, radius, ratio) <= 1.0 + 1e-9


@pytest.mark.parametrize("name", ["plain-h2-n3-d4", "biases", "saturated", "concatenated", "narrow-width-1"])
@pytest.mark.parametrize("pool", ["all", "mean"])
@pytest.mark.one_in(2)
def test_the_bound_covers_the_sum_of_its_five_parts(name: str, pool: Pool) -> None:
    """Equation 19 against ascent on the sum itself; were one part forgotten, the sum would pass the bound."""
    rows = clean_rows(name, pool=pool)
    bound = DisplacementBound(_problem(name, FrobeniusBall(), Displacement(1.0, pool=pool)), 0)
    for radius in (0.1, 1.5):
        forms = dense_forms(rows, radius)
        inner = rows.clean.mixing * radius

        def total(moves: Tensor, forms: list[Tensor] = forms, inner: float = inner) -> Tensor:
            parts = zip((1.0, inner, inner, inner, rows.clean.mixing), forms, strict=True)
            return torch.stack([scale * form_root(form, moves) for scale, form in parts]).sum(dim=0)

        worst = worst_ratio(rows, radius, total)
        assert 0.9 * bound.usage(radius).value <= worst <= bound.usage(radius).value * (1 + 1e-9)


@pytest.mark.parametrize("index", range(len(THREATS)))
@pytest.mark.parametrize("name", ["plain-h2-n3-d4", "causal-masses", "padding", "saturated"])
@pytest.mark.one_in(4)
def test_no_attack_inside_the_certified_radius(name: str, index: int) -> None:
    goals = (Displacement(0.3), Displacement(0.1, pool="mean"), Displacement(0.1, pool=0))
    problem = _problem(name, THREATS[index], goals[(index + len(name)) % 3])
    certificate = METHOD.certify(problem)
    assert 0.0 < certificate.radius < math.inf
    assert certificate.kind is Kind.FLOAT64
    assert _ascend(problem, certificate.radius) < 1.0


def test_small_tolerances_are_certified_almost_exactly() -> None:
    """The remainder vanishes like r^2, so the gap tends to 1; a first order that is not exact would show."""
    problem = _problem("biases", FrobeniusBall(), Displacement(1e-5))
    certificate = METHOD.certify(problem)
    assert _ascend(problem, 1.005 * certificate.radius, steps=200) > 1.0


def test_token_scales_keep_their_sum_and_help() -> None:
    """Equation 20 needs sum 1/t_j^2 <= number of movable tokens; the adapted scales beat the enclosing ball."""
    problem = _problem("causal-masses", PerTokenBall(), Displacement(0.01))
    bound = METHOD.prepare(problem, seed=0)
    assert isinstance(bound, DisplacementBound)
    plain = bound.usage(0.003).value
    for _ in range(3):
        adapted = bound.usage(0.003).value
        assert float(bound.token_scales.square().reciprocal().sum()) <= problem.clean.n * (1 + 1e-12)
    enclosing = METHOD.prepare(_problem("causal-masses", FrobeniusBall(), Displacement(0.01)), seed=0)
    ball = enclosing.usage(0.003 * math.sqrt(problem.clean.n)).value
    assert adapted <= plain * (1 + 1e-9)
    assert adapted < 0.97 * ball


def test_one_token_is_exact() -> None:
    """n = 1: the layer is affine, so the certified radius is tolerance / norm."""
    case = case_named("single-token-biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(2.0))
    norm = float(torch.linalg.matrix_norm(case.attention.value_output.sum(dim=0), 2))
    certificate = METHOD.certify(problem)
    assert certificate.radius <= 2.0 / norm * (1 + 1e-9)
    # The query and key parts have no effect here, but the method's higher-order constants do not know that.
    assert certificate.radius >= 0.2 / norm


@pytest.mark.parametrize("tolerance", [1e-8, 1e-10])
def test_output_that_only_curves(tolerance: float) -> None:
    """Row 0 sees keys t, -t, 0 with values L, L, -2L, so it moves by L (2 cosh t - 2) / (2 cosh t + 1), no first order.

    The rows' normaliser rounds to 1 where the move is small enough for such a tolerance.
    """
    size = 1e3
    column = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[0, 0] = -math.inf
    layer = Attention(column, column, column.flip(1), scale=1.0, mask=mask)
    points = torch.tensor([[0.0, 0.0], [1.0, size], [-1.0, size], [0.0, -2.0 * size]], dtype=torch.float64)
    problem = Problem(layer, TokenMeasure(points), FrobeniusBall(tokens=(0,)), Displacement(tolerance, pool=0))
    radius = METHOD.certify(problem).radius
    exact = 4.0 * size * math.sinh(radius / 2.0) ** 2 / (1.0 + 2.0 * math.cosh(radius))
    assert 0.9 * tolerance <= exact <= tolerance


@pytest.mark.parametrize("threat", [FrobeniusBall(), AnyToken()])
def test_a_tolerance_below_the_rounding_of_the_output_is_no_question(threat: MoveThreat) -> None:
    with pytest.raises(InputError, match="not twice above the rounding of the output"):
        _problem("biases", threat, Displacement(1e-14))


def test_probabilistic_where_the_matrix_is_not_built() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-2])

    layer = Attention(draw(2, 24, 4), draw(2, 24, 4), draw(2, 24, 4))
    points = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    problem = Problem(layer, TokenMeasure(points), FrobeniusBall(), Displacement(0.1))
    certificate = METHOD.certify(problem, seed=5)
    assert certificate.kind is Kind.PROBABILISTIC
    assert 0.0 < certificate.failure_probability < 1e-6
    assert _ascend(problem, certificate.radius) < 1.0
    assert _ascend(problem, 1.5 * certificate.radius) > 1.0


def test_refusals_and_registration() -> None:
    readout = Margin(weight=torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64), pool=0)
    assert "Margin" in str(METHOD.refuses(_problem("biases", FrobeniusBall(), readout)))
    assert METHOD.refuses(_problem("biases", FrobeniusBall(), Displacement(0.1))) is None
    assert any(isinstance(method, DisplacementCertificate) for method in METHODS)


@pytest.mark.parametrize(
    ("size", "gap", "share"), [(1e6, 720.0, 0.05), (1e6, 760.0, 0.9), (1e9, 710.0, 0.5), (1e11, 700.0, 0.5)]
)
def test_hidden_tokens_of_a_fixed_row_grow_back(size: float, gap: float, share: float) -> None:
    """Weights near e^{-gap} times small squared slopes underflow, but a move of ``gap * size`` makes them 1/2."""
    unit = 1e-12 / size
    into = torch.eye(3, dtype=torch.float64)[:, None, :, None]  # query, key and value read one coordinate each
    layer = Attention(w_q=unit * into[0], w_k=into[1] / size, w_v=unit * into[2], scale=1.0)
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[0, 0], x[3, 0] = 1.0 / unit, share / unit
    x[1:3, 1], x[1:3, 2] = -gap * size, 1.0 / unit
    threat, direction = FrobeniusBall(tokens=(1, 2)), torch.zeros_like(x)
    direction[1:3, 1] = 0.5**0.5
    problem = Problem(layer, TokenMeasure(x), threat, Displacement(1.0))
    bound = DisplacementBound(problem, 0)
    majorant, tested = RemainderMajorant(bound.rows), 0
    for reached in (gap - 5.0, gap, gap + 3.0):
        radius = reached * size
        usage = bound.usage(radius).value
        tested += usage < math.inf
        for move in (radius * direction, radius * direction * (2.0**0.5 * torch.eye(4, dtype=x.dtype)[1][:, None])):
            assert float(problem.usage(move[None])) <= usage
            weight = layer.weights(x + move)[0, 0, 0::3].sum()  # of the fixed tokens: their logits hardly change
            inverse = float(majorant.inverse_partition(majorant.reach(radius), radius)[0, 0, 0])
            assert inverse <= float(weight) * (1.0 + 1e-9)
    assert tested == 3


@pytest.mark.parametrize("size", [1e-322, 1e-300, 1e-285, 1.0, 1e150])
def test_power_reach_at_every_scale(size: float) -> None:
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ root.T
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    reach = float(power_eigenvalue(size * matrix, squarings=2))
    assert 0.99 * largest * size <= reach <= 1.3 * largest * size + 1e-322
    assert size < 1e-300 or reach >= largest * size
    assert float(power_eigenvalue(torch.diag(torch.tensor([-1e-17, 1e-17], dtype=torch.float64)), squarings=2)) < 2e-17


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key", [0.0, 1.0])
def test_a_huge_token_that_the_row_does_not_see_changes_nothing(causal: bool, key: float) -> None:
    """Values and keys are shifted by one of their own size, not by a mean that the huge one takes over."""
    into = torch.eye(3, dtype=torch.float64)[:, None, :, None]  # query, key and value read one coordinate each
    x = torch.tensor([[1.0, 0.5 * key, 1e3], [1.0, 0.4 * key, -1e3], [0.0, key, 700.0]], dtype=torch.float64)
    hidden = torch.zeros(3, 3, dtype=torch.float64)
    hidden[:2, 2] = hidden[2, :2] = -math.inf
    layer = Attention(
        w_q=into[0], w_k=into[1], w_v=1e-3 * into[2], mask=None if causal else hidden, causal=causal, scale=1.0
    )
    radii = []
    for size in (1.0, 1e17, 1e20):
        points = torch.cat([x[:2], size * x[2:]])
        problem = Problem(layer, TokenMeasure(points), FrobeniusBall(tokens=(0,)), Displacement(0.1, pool=1))
        radii.append(METHOD.certify(problem).radius)
        assert _ascend(problem, radii[-1]) <= 1.0
    assert radii == pytest.approx([radii[0]] * 3, rel=2e-3)  # the search's tolerance is 1e-3


def test_a_radius_where_everything_overflows_spoils_no_later_one() -> None:
    """The products' balance starts from the clean weights every time; a product that overflows says infinity."""
    problem = _problem("biases", FrobeniusBall(), Displacement(1.0))
    fresh, used = DisplacementBound(problem, 0), DisplacementBound(problem, 0)
    for exponent in (1.0, 2.0, 5.0, 12.0):
        assert used.usage(10.0**exponent).value > 1.0
    assert used.usage(0.01).value == pytest.approx(fresh.usage(0.01).value, rel=0.02)
