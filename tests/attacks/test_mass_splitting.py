"""Mass splitting: the explicit cases of the theory, what a result says, masks, bad input."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, MassSplitting, attack
from attnrobust.attacks.measures.expand import expand_layer, expanded_problem
from attnrobust.attacks.measures.goal import MeasureReader, query_sensitivity
from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.network import Network, Residual
from attnrobust.numerics.transport import wasserstein
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits
from tests.cases import Case, case_named, cases

QUICK = AttackBudget(restarts=2, steps=8, rounds=2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_head(a: list[list[float]], v: list[list[float]]) -> Attention:
    """Scores ``(A x_i) . x_j``, values ``V x_j``."""
    matrix, value = torch.tensor(a).double(), torch.tensor(v).double()
    eye = torch.eye(matrix.shape[0]).double()
    return Attention(w_q=matrix.T.contiguous()[None], w_k=eye[None], w_v=value.T.contiguous()[None], scale=1.0)


def local_ratio(result: AttackResult) -> float:
    """``W_2(output) / W_2(input)``; the tolerance of the problem is sqrt(n)."""
    return result.usage / result.radius


# ---- explicit cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("e", "gain"), [(0.5, 2.236), (0.1, 10.05), (0.01, 100.005)])
def test_splitting_beats_moving_by_any_factor(e: float, gain: float) -> None:
    """Two tokens, all blocks of the Jacobian equal: moving reaches e, splitting in halves sqrt(1 + e^2)."""
    layer = one_head([[0.0, -1 / e], [1 / e, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    clean = TokenMeasure(torch.tensor([[-e, 1.0], [e, -1.0]]).double())
    problem = Problem(layer, clean, WassersteinBall(2), Displacement(math.sqrt(2)))
    result = attack(problem, method=MassSplitting(fractions=(0.5,)), epsilon=1e-3 * e)
    assert local_ratio(result) == pytest.approx(math.sqrt(1 + e * e), rel=2e-3)
    assert result.moving_radius / result.radius == pytest.approx(e, rel=2e-3)
    assert result.gain == pytest.approx(gain, rel=3e-3)


def test_a_tiny_mass_travels_far() -> None:
    """x = +-3: the Jacobian has norm 1 and the own-query blocks vanish, yet W_2 grows by 1.633."""
    epsilon = 3.5e-4
    layer = one_head([[1.0]], [[1.0]])
    clean = TokenMeasure(torch.tensor([[3.0], [-3.0]]).double())
    problem = Problem(layer, clean, WassersteinBall(2, domain_radius=3.0), Displacement(math.sqrt(2)))
    assert float(query_sensitivity(problem).max()) < 1e-6
    result = attack(problem, epsilon=epsilon)
    assert_at_most(1.6325, local_ratio(result))
    assert_at_most(local_ratio(result), 1.634)
    assert result.moving_radius / epsilon == pytest.approx(1.0, rel=1e-4)
    assert float(result.atoms.mass.min()) < 1e-5


@pytest.mark.parametrize("name", ["plain-h3-n8-d6", "masses", "causal", "finite-mask"])
def test_own_query_blocks_are_those_of_a_probe_without_mass(name: str) -> None:
    """An atom of negligible mass at token i reacts to its own move by the own-query block and by nothing else."""
    case = case_named(name)
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
    sizes = query_sensitivity(problem)
    for i in range(case.n):
        parent = torch.cat([torch.arange(case.n), torch.tensor([i])])
        mass = case.tokens.mass[parent].clone()
        mass[i], mass[-1] = mass[i] * (1 - 1e-12), mass[i] * 1e-12
        probe = expanded_problem(problem, parent, mass, row_scale=torch.ones_like(mass))
        dense = torch.func.jacrev(probe.network)(probe.clean.points, probe.clean.mass)
        exact = float(torch.linalg.matrix_norm(dense[-1, :, -1], ord=2))
        # power iteration approaches from below; eight steps rank the tokens
        assert_at_most(float(sizes[i]), exact + 1e-11)
        assert_at_most(0.8 * exact, float(sizes[i]) + 1e-11)


# ---- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [CouplingBall(2), WassersteinBall(1), CouplingBall(math.inf)], ids=lambda t: t.key)
@pytest.mark.parametrize("name", ["masses", "causal"])
@pytest.mark.one_in(2)
def test_results_are_verified_and_never_worse_than_moving(name: str, threat: MeasureThreat) -> None:
    case = case_named(name)
    domain = 1.5 * float(torch.linalg.vector_norm(case.tokens.points, dim=1).max())
    for goal in (Displacement(0.2), Margin(draw(3, 4), pool=1)):
        ball = type(threat)(threat.order, domain_radius=domain)
        problem = Problem(case.attention, case.tokens, ball, goal)
        result = attack(problem, budget=QUICK)
        assert result.status is Status.FOUND
        assert result.attack == "mass-splitting"
        assert result.problem == problem.digest
        assert_at_most(result.radius, result.moving_radius)
        atoms = result.atoms
        assert atoms is not None
        assert atoms.keeps_masses(case.tokens)
        assert ball.distance(case.tokens, atoms) == result.radius
        assert_at_most(float(torch.linalg.vector_norm(atoms.points, dim=1).max()), domain, rtol=1e-12)
        used = MeasureReader(problem, atoms.mass, atoms.parent).usage(atoms.points[None])
        assert float(used[0]) == pytest.approx(result.usage, rel=1e-9)
        assert result.usage >= 1.0
        if goal.pool == 1:
            assert int((atoms.parent == 1).sum()) == 1


def test_moving_alone_is_the_token_moving_attack() -> None:
    """Equal masses, coupling cost W_2: sqrt(n) times the radius is the Frobenius radius."""
    case = case_named("plain-h3-n8-d6")
    for goal in (Displacement(0.2), Displacement(0.1, pool="mean")):
        problem = Problem(case.attention, case.tokens, FrobeniusBall(), goal)
        ball = Problem(case.attention, case.tokens, CouplingBall(2), goal)
        moved = attack(ball, method=MassSplitting(tokens=()), budget=QUICK)
        direct = attack(problem).radius
        assert moved.radius == moved.moving_radius
        # output transport may pair rows differently than the moves do, so it is never above the Frobenius change
        assert_at_most(direct * 0.99, moved.radius * math.sqrt(case.n))
        assert_at_most(moved.radius * math.sqrt(case.n), direct * 1.01)


def test_fixed_epsilon_stays_inside() -> None:
    case = case_named("biases")
    for threat in (CouplingBall(2), WassersteinBall(2), CouplingBall(math.inf)):
        problem = Problem(case.attention, case.tokens, threat, Displacement(0.5))
        result = attack(problem, epsilon=0.05, budget=QUICK)
        assert_at_most(result.radius, 0.05, rtol=1e-9)
        assert result.usage >= result.moving_radius
        assert result.epsilon == 0.05


def test_use_of_the_budget_below_one_is_not_a_violation() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, CouplingBall(2), Displacement(0.5))
    result = attack(problem, method=MassSplitting(tokens=(0,), fractions=(0.5,)), epsilon=1e-3, budget=QUICK)
    assert 0.0 < result.usage < 1.0
    assert result.status is Status.NOT_FOUND


def test_one_token_cannot_gain() -> None:
    case = case_named("single-token")
    problem = Problem(case.attention, case.tokens, CouplingBall(math.inf), Displacement(0.3))
    result = attack(problem, budget=QUICK)
    assert result.gain == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("kind", [CouplingBall, WassersteinBall])
def test_only_allowed_tokens_move(kind: type[MeasureThreat]) -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, kind(2, tokens=(1, 3)), Displacement(0.2))
    result = attack(problem, budget=QUICK)
    moved = result.atoms.displacement(case.tokens).abs().amax(dim=1) > 0
    assert set(result.atoms.parent[moved].tolist()) <= {1, 3}


def test_same_seed_same_result() -> None:
    case = case_named("masses")
    problem = Problem(case.attention, case.tokens, CouplingBall(2), Displacement(0.2))
    first, second = (attack(problem, seed=3, budget=QUICK) for _ in range(2))
    assert first.radius == second.radius
    assert_same_bits(first.atoms.points, second.atoms.points)


# ---- writing tokens as atoms -------------------------------------------------------------------------------------


def test_a_split_in_place_changes_nothing(case: Case) -> None:
    """Also under masks: all copies of a token share its position and see each other."""
    parent = torch.cat([torch.arange(case.n), torch.arange(case.n)[::2]])
    share = torch.rand(case.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    mass = case.tokens.mass[parent].clone()
    mass[case.n :] *= share[::2]
    mass[: case.n][::2] *= 1 - share[::2]
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
    expanded = expanded_problem(problem, parent, mass, row_scale=torch.ones_like(mass))
    clean = problem.clean_output
    assert_close(expanded.clean_output, clean[parent], rtol=1e-11, atol=1e-13)
    same = wasserstein(TokenMeasure(clean, case.tokens.mass), TokenMeasure(expanded.clean_output, mass), order=2)
    assert_at_most(same.upper.value, 1e-6 * (1 + float(clean.abs().max())))


def test_layers_inside_networks_are_expanded() -> None:
    case = case_named("causal")
    network = Network((Residual(case.attention), case.attention))
    parent = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2])
    mass = case.tokens.mass[parent].clone()
    mass[[2, 7]] *= 0.5
    expanded = expand_layer(network, parent, case.n)
    points = case.tokens.points[parent]
    assert_close(expanded(points, mass), network(case.tokens.points)[parent], rtol=1e-12)


def test_bad_input_says_what_is_wrong() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, CouplingBall(2), Displacement(0.2))
    for fractions, word in (((0.5, 1.5), "1.5"), ((-0.1,), "-0.1"), ((), "none")):
        with pytest.raises(InputError, match=rf"in \(0, 1\); got {word}"):
            MassSplitting(fractions=fractions)
    with pytest.raises(InputError, match="token 99"):
        attack(problem, method=MassSplitting(tokens=(99,)))
    with pytest.raises(InputError, match="epsilon must be"):
        attack(problem, epsilon=0.0)
    with pytest.raises(InputError, match=r"outside of the domain radius 0\.1"):
        Problem(case.attention, case.tokens, CouplingBall(2, domain_radius=0.1), Displacement(0.2))
    moving = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.2))
    with pytest.raises(UnsupportedThreatError, match="name 'token-moving'"):
        attack(moving, method="mass-splitting")
    causal = case_named("causal")
    with pytest.raises(InputError, match="in their order"):
        expand_layer(causal.attention, torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]), 7, order="strict")


def test_nothing_to_find_is_not_found() -> None:
    case = next(c for c in cases() if c.constant)
    problem = Problem(case.attention, case.tokens, CouplingBall(2), Displacement(0.2))
    result = attack(problem, budget=QUICK)
    assert result.status is Status.NOT_FOUND
    assert result.radius == math.inf
    assert result.atoms is None
