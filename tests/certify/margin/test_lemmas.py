"""Each lemma of docs/margin-certificate.md by itself, against dense evaluation or sampling."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Budget, constants, largest_quadratic
from attnrobust.certify.margin.all_tokens.functional import ellipsoid
from attnrobust.certify.margin.all_tokens.majorant import initial_parameters, majorant, pieces
from attnrobust.certify.margin.all_tokens.method import MarginBound, MarginCertificate
from attnrobust.certify.margin.one_token.logistic import remainder_range
from attnrobust.certify.margin.quadratic_form import moments
from attnrobust.certify.margin.rows import direction_gram, own_block
from attnrobust.certify.margin.scalar import (
    largest_remainder,
    log_phi,
    log_psi,
    phi_negative,
    psi,
    saturating_coefficient,
    weighted_phi,
)
from attnrobust.certify.margin.small_trust_regions import many_approximate, many_certified
from attnrobust.certify.margin.trust_region import (
    Quadratic,
    approximate,
    decomposed_bound,
    factorised_bound,
    iterated_bound,
)
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.eigenvalues import gram_eigenvalue, spread_eigenvalue
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import random_problem
from tests.stress import Draw, boundary_moves

SEEDS = range(8)


def frobenius(problem: Problem, radius: float) -> Budget:
    n, d = problem.clean.points.shape
    threat = problem.moves
    return Budget(radius * threat.frobenius_factor(n, d), radius * threat.token_factor(n, d), radius)


def radius_of(problem: Problem, share: float) -> float:
    return share * float(problem.clean.points.norm()) / problem.clean.n**0.5


# ---- scalars ---------------------------------------------------------------------------------------------------------


def test_psi_and_its_logarithm_against_high_precision() -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for u in (1e-6, 1e-3, 0.3, 5.0, 29.0, 31.0, 400.0):
        exact = Decimal(u).exp() - 1 - Decimal(u)
        got = torch.tensor([u], dtype=torch.float64)
        assert float(log_psi(got)) == pytest.approx(float(exact.ln()), rel=1e-9)
        assert float(log_phi(got)) >= float((2 * exact / Decimal(u) ** 2).ln()) - 1e-12
        negative = (-Decimal(u)).exp() - 1 + Decimal(u)
        assert float(psi(-got)) == pytest.approx(float(negative), rel=1e-9)
        assert float(phi_negative(got)) == pytest.approx(float(2 * negative / Decimal(u) ** 2), rel=1e-6)


def test_saturating_suprema_are_upper_bounds_and_sharp() -> None:
    draw = Draw(0)
    log_w = torch.cat([-5.0 * draw.normal(300).abs(), -300.0 * draw.normal(40).abs(), torch.zeros(1).double()])
    limit = torch.cat([10 ** (0.7 * draw.normal(300)), 200.0 * draw.normal(40).abs() + 1.0, torch.ones(1).double()])
    curve, ramp = saturating_coefficient(log_w, limit)
    u = limit[:, None] * torch.linspace(1e-4, 1.0, 4001, dtype=torch.float64)
    share = log_w[:, None] + log_psi(u)
    log_s = share - torch.nn.functional.softplus(share)
    true_curve = (log_s + math.log(2.0) - 2.0 * u.log()).exp().amax(-1)
    true_ramp = ((log_s - u.log()).exp() * (1.0 - log_w.exp()[:, None] * u).clamp_min(0.0)).amax(-1)
    assert bool((curve >= true_curve).all())
    assert bool((ramp >= true_ramp * (1.0 - 1e-12)).all())
    assert float((curve / true_curve)[:300].median()) < 1.01
    assert float((ramp / true_ramp.clamp_min(1e-300))[:300].median()) < 1.02


def test_saturated_row_is_not_clamped() -> None:
    """w ~ e^-460 and U = 480: clamping psi at e^300 would report about 0 for a coefficient of 2 / U^2."""
    log_w, limit = torch.tensor([-460.0]).double(), torch.tensor([480.0]).double()
    curve, _ = saturating_coefficient(log_w, limit)
    share = log_w + log_psi(limit)
    assert float(curve) >= float(2.0 * torch.sigmoid(share) / limit**2)
    assert math.isinf(float(weighted_phi(torch.tensor([0.0]).double(), torch.tensor([700.0]).double())))


def test_hidden_tokens_have_zero_coefficients() -> None:
    hidden = torch.tensor([-math.inf]).double()
    for limit in (0.0, 1.0):
        curve, ramp = saturating_coefficient(hidden, torch.tensor([limit]).double())
        assert float(curve) == 0.0
        assert float(ramp) == 0.0


def test_largest_remainder_of_centred_changes() -> None:
    draw = Draw(5)
    for spread in (0.0, 1.0, 8.0):
        weight = torch.softmax(spread * draw.normal(40, 5), dim=-1)
        limit = 4.0 * draw.normal(40, 5).abs()
        bound = largest_remainder(weight, limit)
        best = torch.zeros(40, dtype=torch.float64)
        for _ in range(300):
            u = limit * (draw.normal(40, 5).sign() if draw.between(0.0, 1.0) < 0.7 else draw.normal(40, 5).clamp(-1, 1))
            up, down = (weight * u.clamp_min(0.0)).sum(-1), (weight * (-u).clamp_min(0.0)).sum(-1)
            least = torch.minimum(up, down)  # the larger side shrinks until the mean is 0
            factor = torch.where(u > 0.0, (least / up)[:, None], (least / down)[:, None]).nan_to_num(0.0)
            best = torch.maximum(best, (weight * psi(u * factor)).sum(-1))
        assert bool((best <= bound).all())
        assert float((best / bound).amax()) > 0.9
    equal = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert float(largest_remainder(equal, 12.0 * equal)) == pytest.approx(math.cosh(3.0) - 1.0, rel=1e-9)
    huge = largest_remainder(equal, torch.full((1, 4), 640.0, dtype=torch.float64))
    assert torch.isfinite(huge).all()


def test_logistic_remainder_range() -> None:
    draw = Draw(1)
    logit = torch.cat([3.0 * draw.normal(200), 40.0 * draw.normal(50)])
    limit = 10 ** (0.6 * draw.normal(250))
    upper, lower = remainder_range(logit, limit)
    a = limit[:, None] * torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    a = torch.where(a.abs() < 0.02, 0.02, a).clamp(-limit[:, None].clamp_min(0.02), limit[:, None].clamp_min(0.02))
    p = torch.sigmoid(logit)[:, None]
    g = 2.0 * (torch.sigmoid(logit[:, None] + a) - p - p * (1.0 - p) * a) / a**2
    keep = limit > 0.05
    assert bool((upper[keep, None] >= g[keep] - 1e-9).all())
    assert bool((lower[keep, None] <= g[keep] + 1e-9).all())
    assert float((upper - lower).amax()) <= 0.25


# ---- eigenvalues -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_spread_eigenvalue_against_the_dense_matrix(seed: int, sharpness: float) -> None:
    """Below and above the largest coefficient; a weight near 1 (sharpness 30) moves the eigenvalue below it."""
    draw = Draw(seed)
    for n in range(1, 10):
        a = draw.normal(n).abs() * 10 ** draw.normal(n)
        if n % 4 == 0:
            a[:2] = a.max()  # two equal largest coefficients
        w = torch.softmax(sharpness * draw.normal(n), 0)
        movable = (torch.rand(n, generator=draw.generator) < 0.7).double()
        movable[0] = 1.0
        vectors = (torch.eye(n, dtype=torch.float64) - w) * movable
        exact = float(torch.linalg.eigvalsh((vectors * a[:, None]).T @ vectors)[-1])
        found = float(spread_eigenvalue(a, w, movable))
        assert exact * (1.0 - 1e-12) - 1e-15 * float(a.sum()) <= found <= exact * 1.01 + 1e-12


def test_spread_eigenvalue_covers_the_rounding_of_saturated_weights() -> None:
    """A weight that rounds to 1: ``1 - w`` may be 1e-17 and matters beside a coefficient of 1e200."""
    a, w = torch.tensor([1e200, 1.0]).double(), torch.tensor([1.0, 1e-17]).double()
    assert float(spread_eigenvalue(a, w, torch.ones(2).double())) >= 1e200 * 1e-34


@pytest.mark.parametrize("n", [3, 24, 40])
def test_gram_eigenvalue_bounds_from_above(n: int) -> None:
    draw = Draw(n)
    vectors = draw.normal(5, n, 7)
    c = draw.normal(5, n).abs()
    exact = torch.linalg.eigvalsh((vectors * c[..., None]).mT @ vectors)[:, -1]
    found = gram_eigenvalue(vectors @ vectors.mT, c)
    assert bool((found >= exact).all())
    assert bool((found <= exact * n ** (1 / 16) * 1.001).all())


def test_gram_eigenvalue_of_coefficients_that_overflow_is_infinite() -> None:
    """Finite coefficients whose products with the Gram entries are not: a decomposition would raise."""
    gram, c = torch.eye(4, dtype=torch.float64).mul(1e4)[None], torch.tensor([[1e305, 1.0, 1.0, 0.0]]).double()
    assert math.isinf(float(gram_eigenvalue(gram, c)))


def test_radius_far_beyond_the_exponents_has_an_infinite_bound() -> None:
    problem = random_problem(14, PerTokenBall("linf"))
    bound = MarginBound(problem, seed=0)
    assert bound.usage(radius_of(problem, 3.0)).value == math.inf


# ---- clean rows and constants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_directions_are_the_derivative_of_the_centred_scores(seed: int) -> None:
    problem = random_problem(seed, FrobeniusBall(tokens=(0, 2)) if seed % 2 else None)
    bound = MarginBound(problem, seed=0)
    rows, cls = bound.rows, bound.classes[0].rows
    layer, x = problem.network, problem.clean.points
    assert isinstance(layer, Attention)
    move = Draw(seed).normal(*x.shape) * rows.movable[:, None]
    plain = Attention(w_q=layer.w_q, w_k=layer.w_k, w_v=layer.w_v, b_q=layer.b_q, b_k=layer.b_k, scale=layer.scale)
    _, change = torch.autograd.functional.jvp(plain.scores, x, move)
    # The row constant of b_k and of the query's own part drops out by centring.
    centred = change - (rows.weight * change).sum(-1, keepdim=True)
    found = moments(cls, move)
    visible = ~torch.isneginf(rows.log_weight)
    torch.testing.assert_close(found.x[visible], centred[visible], rtol=1e-9, atol=1e-9)
    drop = lambda y: problem.resolved.changes(problem.network(y, problem.mass))[0]  # noqa: E731
    _, slope = torch.autograd.functional.jvp(drop, x, move)
    torch.testing.assert_close((cls.gradient * move).sum(), slope, rtol=1e-8, atol=1e-9)
    first = torch.einsum("i,hi->", cls.pooling, found.d)
    torch.testing.assert_close(first, slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_norms_and_grams_of_the_directions(seed: int) -> None:
    problem = random_problem(50 + seed, FrobeniusBall(tokens=(1, 2)) if seed % 2 else None)
    rows = MarginBound(problem, seed=0).rows
    n, d = rows.points.shape
    unit = (torch.eye(n * d, dtype=torch.float64).reshape(n * d, n, d)) * rows.movable[:, None]
    query = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_q)
    key = torch.einsum("bnd,hdk->bhnk", unit, rows.layer.w_k)
    raw = rows.queries @ key.mT + query @ rows.keys.mT
    l = raw - (rows.weight * raw).sum(-1, keepdim=True)  # noqa: E741 - the directions, (n d, h, n, n)
    dense = l.permute(1, 2, 3, 0)
    torch.testing.assert_close(direction_gram(rows), dense @ dense.mT, rtol=1e-8, atol=1e-8)
    blocks = dense.reshape(*dense.shape[:-1], n, d)
    index = torch.arange(n)
    exact = blocks[:, index, :, index].permute(1, 0, 2, 3)
    for order in (1.0, 2.0, math.inf):
        found = own_block(rows, order)
        norm = torch.linalg.vector_norm(exact, ord=order, dim=-1)
        assert bool((found >= norm * (1.0 - 1e-9) - 1e-9).all())
        assert bool((found <= norm * (1.0 + 1e-6) + 1e-5 * norm.max()).all())


@pytest.mark.parametrize("norm", ["frobenius", "l2", "linf", "l1"])
@pytest.mark.parametrize("seed", range(5))
def test_ranges_and_masses_of_the_constants(norm: str, seed: int) -> None:
    """Lemmas 2, 3 and 4 at random members of the set."""
    threat = FrobeniusBall() if norm == "frobenius" else PerTokenBall(norm)  # type: ignore[arg-type]
    problem = random_problem(300 + seed, threat)
    bound = MarginBound(problem, seed=0)
    rows, layer = bound.rows, problem.network
    assert isinstance(layer, Attention)
    for share in (0.1, 0.7):
        radius = radius_of(problem, share)
        const = constants(rows, bound.geometry, frobenius(problem, radius))
        if float(const.limit.max()) > 600.0:
            continue  # the certificate says nothing there, and e^u overflows here
        moves = boundary_moves(problem, radius, 200, Draw(seed))
        change = layer.scores(problem.clean.points + moves) - layer.scores(problem.clean.points)
        change = torch.where(torch.isneginf(rows.log_weight), 0.0, change)
        u = change - (rows.weight * change).sum(-1, keepdim=True)
        visible = ~torch.isneginf(rows.log_weight)
        assert bool((u.abs() <= const.limit + 1e-9)[:, visible].all())
        mass = (rows.weight * psi(u)).sum(-1)
        part = mass / (1.0 + mass)
        assert bool((part <= const.share + 1e-9).all())
        token = rows.weight * psi(u) / (1.0 + mass[..., None])
        assert bool((token <= 0.5 * const.saturating * u**2 + 1e-12).all())


@pytest.mark.parametrize("seed", range(4))
def test_large_and_small_inputs_use_the_same_eigenvalue_bound(seed: int) -> None:
    """The split of key and query part (long inputs) is an upper bound of what the Gram matrices give."""
    problem = random_problem(70 + seed, FrobeniusBall())
    bound = MarginBound(problem, seed=0)
    coefficient = Draw(seed).normal(*bound.rows.weight.shape).abs()
    exact = largest_quadratic(bound.rows, bound.geometry, coefficient)
    from dataclasses import replace

    wide = largest_quadratic(bound.rows, replace(bound.geometry, gram=None), coefficient)
    assert bool((wide >= exact * (1.0 - 1e-6)).all())


# ---- majorant and trust region ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_majorant_is_symmetric_and_tends_to_the_hessian(seed: int) -> None:
    problem = random_problem(400 + seed, FrobeniusBall())
    bound = MarginBound(problem, seed=0)
    cls, x = bound.classes[0].rows, problem.clean.points
    radius = 1e-6
    const = constants(bound.rows, bound.geometry, frobenius(problem, radius))
    from dataclasses import replace

    start = initial_parameters(cls)
    small = replace(start, split=1e-1 * start.split, bilinear=1e-3 * start.bilinear)
    form = majorant(cls, const, pieces(cls, const, cls.first_norm), small)
    size = x.numel()
    dense = form.flat(torch.eye(size, dtype=x.dtype))
    # At a saturated row the Hessian vanishes; this is its size at a row that is not.
    reach = torch.linalg.vector_norm(torch.cat([bound.rows.beta, bound.rows.alpha], dim=1), dim=-1).amax(-1)
    unit = float((cls.gamma.norm(dim=-1) * reach).sum())
    torch.testing.assert_close(dense, dense.T, rtol=0.0, atol=1e-9 * float(dense.abs().max()) + 1e-14 * unit)
    drop = lambda y: problem.resolved.changes(problem.network(x + y.reshape(x.shape), problem.mass))[0]  # noqa: E731
    hessian = torch.autograd.functional.hessian(drop, torch.zeros(size, dtype=x.dtype))
    gap = torch.linalg.eigvalsh(dense - hessian)
    scale = float(hessian.abs().max())
    assert float(gap[0]) >= -1e-6 * scale - 1e-13 * unit
    assert float(gap[-1]) <= 2e-2 * scale + 1e-9 * unit


def random_quadratic(seed: int, size: int) -> tuple[Tensor, Quadratic]:
    draw = Draw(seed)
    matrix = draw.normal(size, size)
    matrix = 0.5 * (matrix + matrix.T)
    gradient = draw.normal(size)
    if seed % 2:  # hard case: no gradient along the leading eigenvector
        top = torch.linalg.eigh(matrix)[1][:, -1]
        gradient = 0.1 * (gradient - (gradient @ top) * top)
    return matrix, Quadratic(lambda v: v @ matrix, gradient)


@pytest.mark.parametrize("seed", range(6))
def test_trust_region_bounds_are_upper_and_agree(seed: int) -> None:
    matrix, quadratic = random_quadratic(seed, 70)
    radius = (0.01, 0.3, 3.0)[seed % 3]
    exact, solution = decomposed_bound(quadratic, radius)
    inside = [x * min(1.0, radius / float(x.norm())) for x in solution.points]
    best = max(float(quadratic.gradient @ x + 0.5 * x @ matrix @ x) for x in inside)
    assert best <= exact.value * (1.0 + 1e-9)
    assert exact.value <= best * 1.001
    guess = approximate(quadratic, radius, torch.ones(1, 70, dtype=torch.float64), steps=35)
    for found in (
        factorised_bound(quadratic, radius, guess),
        iterated_bound(quadratic, radius, guess, failure_probability=1e-9, seed=seed),
    ):
        assert best * (1.0 - 1e-12) <= found.value <= exact.value * 1.02


@pytest.mark.parametrize("size", [12, 110])
def test_many_small_trust_regions(size: int) -> None:
    drawn = [random_quadratic(seed, size) for seed in range(4)]
    matrix = torch.stack([m for m, _ in drawn])
    gradient = torch.stack([q.gradient for _, q in drawn])
    value, points, multiplier = many_approximate(matrix, gradient, 0.7)
    found = many_certified(matrix, gradient, 0.7, multiplier)
    points = points * (0.7 / points.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    reached = ((gradient * points).sum(-1) + 0.5 * torch.einsum("pld,lde,ple->pl", points, matrix, points)).amax(0)
    assert bool((found >= reached).all())
    assert bool((found <= value * 1.02).all())
    from_below = many_certified(matrix, gradient, 0.7, 0.2 * multiplier)
    assert bool((from_below >= reached).all())


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_ellipsoids_hold_the_set(norm: str) -> None:
    problem = random_problem(9, PerTokenBall(norm))  # type: ignore[arg-type]
    moves = boundary_moves(problem, 0.8, 100, Draw(3))
    n, d = problem.clean.points.shape
    scale = Draw(4).normal(n, d if norm == "linf" else 1).abs() + 0.1
    region = ellipsoid(problem.moves, frobenius(problem, 0.8), scale)
    assert bool(((moves * region.scale).flatten(1).norm(dim=1) <= region.radius * (1.0 + 1e-9)).all())


# ---- closed cases ----------------------------------------------------------------------------------------------------


def test_one_token_alone_is_linear_and_exact() -> None:
    draw = Draw(11)
    layer = Attention(w_q=draw.normal(2, 4, 3), w_k=draw.normal(2, 4, 3), w_v=draw.normal(2, 4, 3))
    x = draw.normal(1, 4)
    readout = draw.normal(2, 6)
    bias = torch.stack([1.0 - (readout @ layer(x)[0])[0], -(readout @ layer(x)[0])[1]])
    problem = Problem(layer, TokenMeasure(x), FrobeniusBall(), Margin(weight=readout, bias=bias))
    gamma = torch.einsum("hde,e->d", layer.value_output, readout[0] - readout[1])
    assert MarginCertificate().certify(problem).radius == pytest.approx(1.0 / float(gamma.norm()), rel=4e-3)


def test_uniform_attention_is_linear_and_exact() -> None:
    draw = Draw(12)
    layer = Attention(w_q=torch.zeros(1, 4, 3).double(), w_k=draw.normal(1, 4, 3), w_v=draw.normal(1, 4, 3))
    x = draw.normal(5, 4)
    readout = draw.normal(2, 3)
    pooled = readout @ layer(x).mean(0)
    problem = Problem(
        layer, TokenMeasure(x), FrobeniusBall(), Margin(weight=readout, bias=torch.tensor([0.5, 0.0]).double() - pooled)
    )
    gamma = layer.value_output[0] @ (readout[0] - readout[1])
    exact = 0.5 / float(gamma.norm()) * 5**0.5
    assert MarginCertificate().certify(problem).radius == pytest.approx(exact, rel=4e-3)
