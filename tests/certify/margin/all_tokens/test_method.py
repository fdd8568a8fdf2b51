"""The quadratic majorant holds pointwise: as a whole, step by step, and term by term (Theorem 1).

Ascent on the violation finds none. Far from the optimum one term may hide behind the slack of another, so each step of
the proof is checked by itself too, the assembled form against the sum of its terms, and where no step has slack the
majorant touches the true drop.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.balance import balanced, references
from attnrobust.certify.margin.all_tokens.constants import Constants, constants
from attnrobust.certify.margin.all_tokens.majorant import Parameters, initial_parameters, majorant, pieces
from attnrobust.certify.margin.all_tokens.method import MarginBound, MarginCertificate
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate
from attnrobust.certify.margin.quadratic_form import FunctionalRows, QuadraticMajorant
from attnrobust.certify.shared.constants import MoveBudget
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.eigenvalues import spread_eigenvalue
from attnrobust.numerics.exponential import psi
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.margin_problems import evaluation_rounding, radius_of, random_problem
from tests.stress import Draw, boundary_moves

ROUNDING = 1e-9  # share of the compared terms; they are sums of a few thousand products


def constants_at(bound: MarginBound, radius: float) -> Constants:
    n, d = bound.problem.clean.points.shape
    threat = bound.problem.moves
    budget = MoveBudget(radius * threat.frobenius_factor(n, d), radius * threat.token_factor(n, d), radius)
    return constants(bound.rows, bound.geometry, budget)


def majorants(problem: Problem, radius: float, seed: int) -> list[tuple[int, QuadraticMajorant]]:
    """The majorant of every class, with initial parameters, balanced ones and random references."""
    bound = MarginBound(problem, seed=0)
    const = constants_at(bound, radius)
    if float(const.limit.max()) > 600.0:
        return []
    found = []
    for index, holder in enumerate(bound.functionals):
        functional = holder.rows
        piece = pieces(functional, const, functional.first_norm)
        start = initial_parameters(functional)
        moved = balanced(
            functional, const, piece, start, references(functional, boundary_moves(problem, radius, 3, Draw(seed)))
        )
        draw = Draw(seed + 7)  # references may have any sign
        random = replace(
            moved, reference=draw.normal(*moved.reference.shape), value=0.5 * draw.normal(*moved.value.shape)
        )
        found += [(index, majorant(functional, const, piece, par)) for par in (start, moved, random)]
    return found


def excess(problem: Problem, index: int, form: QuadraticMajorant, move: Tensor) -> tuple[Tensor, Tensor]:
    """(drop - majorant, size of the compared terms) for a batch of moves."""
    drop = problem.resolved.changes(problem.network(problem.clean.points + move, problem.mass))[..., index]
    linear = (form.gradient * move).sum((-1, -2))
    quadratic = 0.5 * (move * form.apply(move)).sum((-1, -2))
    size = drop.abs() + linear.abs() + quadratic.abs() + form.constant
    return drop - form.constant - linear - quadratic - evaluation_rounding(problem), size + 1e-9


def worst_excess(problem: Problem, radius: float, seed: int, *, steps: int) -> float:
    """Largest relative violation met on the way of the ascent."""
    worst = -math.inf
    for index, form in majorants(problem, radius, seed):
        move = boundary_moves(problem, radius, 8, Draw(seed + 1))
        for step in range(steps):
            move = move.clone().requires_grad_(True)
            over, size = excess(problem, index, form, move)
            assert torch.isfinite(over).all()
            assert torch.isfinite(form.square).all()
            worst = max(worst, float((over / size).detach().max()))
            (gradient,) = torch.autograd.grad((over / move.detach().square().sum((-1, -2))).sum(), move)
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
            rate = 0.2 * radius * (1.0 - 0.8 * step / steps)
            move = problem.moves.project(move.detach() + rate * gradient / length, radius)
    return worst


THREATS: dict[str, MoveThreat | None] = {
    "frobenius": None,
    "subset": FrobeniusBall(tokens=(0, 2)),
    "one token": FrobeniusBall(tokens=(1,)),
    "per token": PerTokenBall("l2"),
    "linf": PerTokenBall("linf"),
    "l1": PerTokenBall("l1", tokens=(1, 2, 3)),
}


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.one_in(3)
def test_majorant_holds_pointwise(name: str, seed: int) -> None:
    problem = random_problem(100 * list(THREATS).index(name) + seed, THREATS[name])
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 1.5):
        assert worst_excess(problem, share * scale, seed, steps=10) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_majorant_holds_pointwise_on_many_problems(seed: int) -> None:
    problem = random_problem(10_000 + seed)
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    for share in (0.05, 0.5, 1.5):
        assert worst_excess(problem, share * scale, seed, steps=25) <= ROUNDING


# ---- step by step ----------------------------------------------------------------------------------------------------


def random_parameters(functional: FunctionalRows, draw: Draw) -> Parameters:
    """Any positive parameters and any references, far from every balance."""

    def positive(shape: torch.Size) -> Tensor:
        return 10.0 ** draw.normal(*shape)

    pair = functional.rows.weight.shape
    row, token = pair[:2], pair[::2]
    return Parameters(
        split=positive(row), reference=draw.normal(*row), value=draw.normal(*token), pair=positive(pair),
        bilinear=positive(pair), query_value=positive(row), query_mean=positive(row), gauge=positive(row),
    )  # fmt: skip


class Steps:
    """Both sides of every step of the proof at one move, from the scores and the definitions; (h, i) each."""

    def __init__(
        self, problem: Problem, functional: FunctionalRows, const: Constants, par: Parameters, move: Tensor
    ) -> None:
        layer, clean, w = problem.network, problem.clean.points, functional.rows.weight
        assert isinstance(layer, Attention)

        def mean(value: Tensor) -> Tensor:
            return (w * value).sum(-1)

        turned = move[functional.rows.asked] @ layer.bilinear  # A^T delta_i
        products = turned @ move.T
        change = (layer.scores(clean + move) - layer.scores(clean))[:, functional.rows.asked]
        change = torch.where(torch.isneginf(functional.rows.log_weight), 0.0, change)
        u, q = change - mean(change)[..., None], products - mean(products)[..., None]
        q = torch.where(torch.isneginf(functional.rows.log_weight), 0.0, q)
        x = u - q
        t = (functional.gamma @ move.T)[:, None]
        r, size = const.budget.frobenius, functional.value_norm
        theta, unit = (par.value * size * r)[:, None], (functional.first_norm * r).clamp_min(1e-100)
        tau, omega, e = par.split * unit, par.reference * unit, par.pair * size[..., None]
        s1, s2 = par.query_value * size, par.query_mean
        v, s = functional.advantage - theta, t - theta
        centred = v - mean(v)[..., None]
        rest = mean(psi(u))
        p = rest / (1.0 + rest)
        eta = torch.minimum(w, 0.5 * (const.slope_same - const.slope).clamp_min(0.0))
        kappa = torch.maximum(const.slope + eta, const.slope_same - eta)
        kept = w - eta
        first, changed = mean(x * functional.advantage) - mean(t), mean(x * v) - mean(t)
        nu = v + (tau - omega)[..., None]
        curve = torch.where(nu > 0, nu * const.saturating, nu * const.curvature)
        whole = curve + e * kappa
        up = whole > 0
        eps = torch.where(up, par.bilinear, par.bilinear.clamp_max(1.0))
        square = whole * torch.where(up, 1.0 + eps, 1.0 - eps)
        cross = whole * torch.where(up, 1.0 + 1.0 / eps, 1.0 - 1.0 / eps)
        energy = r**2 * spread_eigenvalue(cross, w, functional.rows.movable)
        length = turned.square().sum(-1)
        moved = ((w * centred) @ move).square().sum(-1)
        values = (kept * s**2).sum(-1) - torch.where((eta == 0).all(-1), mean(s.expand_as(w)) ** 2, 0.0)
        cut = 0.25 * const.share / tau * (changed - omega) ** 2
        pair = 0.5 * (kappa / e * s**2).sum(-1)
        mixed = 0.5 * const.share * (s2 * length + moved / s2)
        own = 0.5 * const.spread * (s1 * length + values / s1)
        curvature = 0.5 * ((square * x**2).sum(-1) + energy * length)
        self.drop = mean(u.exp() * (functional.advantage - t)) / (1.0 + rest)
        self.sides: dict[str, tuple[Tensor, Tensor]] = {
            "1 cut of the first order": (-p * changed, p * (tau - omega) + cut),
            "2 mass of the remainder": ((1.0 - p) * mean(psi(u) * nu), 0.5 * (curve * u**2).sum(-1)),
            "3 change and value": (
                p * mean(u * s) - (1.0 - p) * mean(psi(u) * s) - (eta * u * s).sum(-1),
                0.5 * (kappa * e * u**2).sum(-1) + pair,
            ),
            "4 bilinear and mean": (-p * mean(q * v), mixed),
            "5 bilinear and value": (-(kept * q * s).sum(-1), own),
            "6 bilinear and linear": (0.5 * (whole * u**2).sum(-1), curvature),
        }
        exact = [first, mean(q * centred), -(kept * x * t).sum(-1), -(eta * theta * x).sum(-1)]
        terms = torch.stack([*exact, cut, pair, mixed, own, curvature])
        self.total = float((functional.pooling * terms).sum())
        self.size = float((functional.pooling * terms.abs()).sum())


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.one_in(2)
def test_every_step_holds_and_the_form_is_their_sum(name: str, seed: int) -> None:
    """Each inequality by itself at random moves and parameters; the form has every term with its sign."""
    problem = random_problem(2000 + 100 * list(THREATS).index(name) + seed, THREATS[name])
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    bound, draw = MarginBound(problem, seed=0), Draw(seed)
    functional = bound.functionals[0].rows
    for share in (0.05, 0.5, 1.5):
        const = constants_at(bound, share * scale)
        if float(const.limit.max()) > 600.0:
            continue
        for move in boundary_moves(problem, share * scale, 4, draw):
            move = move * draw.between(0.3, 1.0)
            par = random_parameters(functional, draw)
            steps = Steps(problem, functional, const, par, move)
            for step, (left, right) in steps.sides.items():
                assert bool((left <= right + ROUNDING * (left.abs() + right.abs()) + 1e-12).all()), step
            drop = float(problem.resolved.changes(problem.network(problem.clean.points + move, problem.mass))[0])
            assert float((functional.pooling * steps.drop).sum()) == pytest.approx(drop, rel=1e-8, abs=1e-9)
            form = majorant(functional, const, pieces(functional, const, functional.first_norm), par)
            value = float(form.at(move))
            assert value == pytest.approx(steps.total, abs=ROUNDING * (steps.size + float(form.constant)))


def collapse(problem: Problem, functional: FunctionalRows, draw: Draw, *, length: float) -> Tensor:
    """A move after which every head has equal values, so that the weights do not matter; random otherwise."""
    x, gamma = problem.clean.points, functional.gamma
    onto = torch.linalg.pinv(gamma) @ gamma
    noise = length * draw.normal(*x.shape)
    return noise - (x + noise - x.mean(0)) @ onto


@pytest.mark.parametrize("seed", range(12))
def test_majorant_touches_the_drop_where_the_values_become_equal(seed: int) -> None:
    """References at a move that equalises all values: no step has slack there, at any radius.

    Then ``nu_j = tau``, ``s = 0`` and ``d' = omega``, and what tau, e, s1, s2 cost is as small as they are.
    """
    problem = random_problem(3000 + seed, FrobeniusBall())
    bound, draw = MarginBound(problem, seed=0), Draw(seed)
    functional = bound.functionals[0].rows
    rows = functional.rows
    scale = float(problem.clean.points.norm()) / problem.clean.n**0.5
    move = collapse(problem, functional, draw, length=(0.1, 0.5)[seed % 2] * scale)
    radius = float(move.norm())
    const = constants_at(bound, radius)
    if float(const.limit.max()) > 600.0:
        return
    t = functional.gamma @ move.T
    unit = (functional.first_norm * radius).clamp_min(1e-100)
    row, small = torch.ones_like(unit), 1e-7
    par = Parameters(
        split=small * row, reference=-(rows.weight @ t[..., None])[..., 0] / unit,
        value=t / (functional.value_norm * radius),
        pair=small * torch.ones_like(rows.weight), bilinear=torch.ones_like(rows.weight), query_value=small * row,
        query_mean=small * row, gauge=row,
    )  # fmt: skip
    form = majorant(functional, const, pieces(functional, const, functional.first_norm), par)
    over, size = excess(problem, 0, form, move)
    # Equal tokens: there is nothing to drop, but tau still costs.
    spent = small * radius * float(functional.value_norm.max())
    assert -1e-4 * float(size) - spent <= float(over) <= ROUNDING * float(size)
    near = problem.moves.project(move + 0.2 * scale * draw.normal(40, *move.shape), radius)
    over, size = excess(problem, 0, form, torch.cat([near, boundary_moves(problem, radius, 40, draw)]))
    assert bool((over <= ROUNDING * size).all())


@pytest.mark.parametrize("tokens", [(0,), (0, 1)])
@pytest.mark.parametrize("key", [0.0, 1.0])
@pytest.mark.one_in(4)
def test_a_huge_token_that_the_row_does_not_see_enlarges_nothing(tokens: tuple[int, ...], key: float) -> None:
    """Values and keys are shifted by one of their own size; a mean would round the small ones away."""
    into = torch.eye(3, dtype=torch.float64)[:, None, :, None]  # query, key and value read one coordinate each
    x = torch.tensor([[1.0, 0.5 * key, 1e3], [1.0, 0.4 * key, -1e3], [0.0, key, 700.0]], dtype=torch.float64)
    layer = Attention(w_q=into[0], w_k=into[1], w_v=1e-3 * into[2], causal=True, scale=1.0)
    goal = Margin(
        weight=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        bias=torch.tensor([0.3, 0.0], dtype=torch.float64),
        pool=1,
        label=0,
    )
    methods = [MarginCertificate(), *([MarginTokenCertificate()] if len(tokens) == 1 else [])]
    for method in methods:
        radii = []
        for size in (1.0, 1e6, 1e17, 1e20):
            clean = TokenMeasure(torch.cat([x[:2], size * x[2:]]))
            radii.append(method.certify(Problem(layer, clean, FrobeniusBall(tokens=tokens), goal)).radius)
        assert max(radii) <= 1.01 * radii[0]


def test_radius_far_beyond_the_exponents_has_an_infinite_bound() -> None:
    problem = random_problem(14, PerTokenBall("linf"))
    bound = MarginBound(problem, seed=0)
    assert bound.usage(radius_of(problem, 3.0)).value == math.inf


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
