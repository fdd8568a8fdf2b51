"""The token-moving attack: exact answers on linear layers, contracts on every case, bad input."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack, attack_many, token_moving, token_radii
from attnrobust.attacks.method import Search
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.projected_gradient import Finish, Start, search_rows
from attnrobust.attacks.verification import MovedTokens, shrink_to_boundary, verify
from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits
from tests.cases import Case, case_named, cases, problems

QUICK = AttackBudget(restarts=4, steps=15, rounds=2)
LINEAR = ("single-token", "uniform-w_q-zero", "uniform-w_q-zero-masses")
"""Cases whose layer is affine in the tokens, so that the first order is everything."""
CONVEX_GOALS: tuple[Goal, ...] = (Displacement(0.1), Displacement(0.3, pool="mean"), Displacement(0.2, pool=0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(problem: Problem) -> Tensor:
    """Dense Jacobian of the pooled output, rows flattened, (m, n, d)."""

    def pooled(x: Tensor) -> Tensor:
        return problem.resolved.pooled(problem.network(x, problem.mass)).flatten()

    return torch.func.jacrev(pooled)(problem.clean.points)


def check_verified(problem: Problem, result: AttackResult) -> None:
    """What a result says holds when it is measured again here."""
    assert result.problem == problem.digest
    if result.perturbed is None:
        assert result.status is not Status.FOUND
        assert result.radius == math.inf
        return
    delta = result.perturbed - problem.clean.points
    assert float(problem.moves.distance(delta)) == result.radius
    output = problem.network(result.perturbed, problem.mass)
    assert_close(problem.resolved.usage(output), torch.tensor(result.usage, dtype=torch.float64), rtol=1e-9)
    assert (result.status is Status.FOUND) == (result.usage >= 1.0)
    if result.epsilon is not None:
        assert_at_most(result.radius, result.epsilon, rtol=1e-12)


# ---- exact answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("goal", CONVEX_GOALS, ids=lambda goal: goal.key)
@pytest.mark.parametrize("threat", [FrobeniusBall(), FrobeniusBall(tokens=(0,)), AnyToken()], ids=lambda t: t.key)
@pytest.mark.one_in(3)
def test_linear_layer_displacement_is_the_singular_value(name: str, goal: Goal, threat: MoveThreat) -> None:
    case = case_named(name)
    problem = Problem(case.attention, case.tokens, threat, goal)
    dense = jacobian(problem)
    blocks = (
        [dense[:, [i]] for i in range(case.n)] if isinstance(threat, AnyToken) else [dense[:, threat.movable(case.n)]]
    )
    top = max(float(torch.linalg.matrix_norm(block.flatten(1), ord=2)) for block in blocks)
    exact = float(problem.resolved.budgets[0]) / top
    result = attack(problem)
    assert result.status is Status.FOUND
    assert_at_most(exact, result.radius, rtol=1e-9, what="no attack is below the exact radius")
    assert_at_most(result.radius, exact * 1.0005, what="0.999 of the optimum")
    stronger = attack(problem, epsilon=3 * exact)
    assert_at_most(stronger.usage, 3.0, rtol=1e-9)
    assert_at_most(2.9985, stronger.usage)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(
    "threat",
    [FrobeniusBall(), PerTokenBall(), PerTokenBall(norm="linf"), PerTokenBall(norm="l1"), AnyToken()],
    ids=lambda t: t.key,
)
def test_linear_layer_margin_is_the_dual_norm(name: str, threat: MoveThreat) -> None:
    case = case_named(name)
    weight = draw(4, case.attention.out_width)
    problem = Problem(case.attention, case.tokens, threat, Margin(weight, pool="mean"))
    dense = jacobian(problem).flatten(1)
    gradients = (problem.resolved.functionals @ dense).unflatten(1, case.tokens.points.shape)
    exact = float((problem.resolved.budgets / threat.dual_norm(gradients)).min())
    result = attack(problem)
    assert_at_most(exact, result.radius, rtol=1e-9)
    assert_at_most(result.radius, exact, rtol=1e-6)
    stronger = attack(problem, epsilon=2 * exact).usage
    assert_at_most(stronger, 2.0, rtol=1e-9)
    assert_at_most(2.0, stronger, rtol=1e-6)


# ---- contracts on every case -------------------------------------------------------------------------------------


def test_every_result_is_verified(case: Case) -> None:
    for index, problem in enumerate(problems(case)):
        result = attack(problem, budget=QUICK)
        check_verified(problem, result)
        wild = 1e3 * draw(4, *case.tokens.points.shape) * problem.threat.movable(case.n)[:, None]
        hopeless = case.constant or float(problem.usage(wild).abs().max()) < 1e-9  # hidden or disconnected tokens
        assert result.status is (Status.NOT_FOUND if hopeless else Status.FOUND), result
        if result.status is Status.FOUND and index % 4 == 0:
            inside = attack(problem, epsilon=1.2 * result.radius, budget=QUICK)
            check_verified(problem, inside)


def test_nothing_nearer_along_the_ray() -> None:
    """A reported minimal radius ends on the boundary of its ray: slightly shorter does not violate."""
    for case in cases(max_n=6)[:12]:
        problem = next(problems(case))
        result = attack(problem, budget=QUICK)
        if result.perturbed is not None:
            delta = (result.perturbed - problem.clean.points) * (1 - 1e-7)
            assert float(problem.usage(delta)) < 1.0, case.name


@pytest.mark.parametrize("name", ["plain-h4-n16-d8", "causal-masses", "biases"])
@pytest.mark.one_in(2)
def test_restarts_and_steps_only_help_a_little(name: str) -> None:
    case = case_named(name)
    for problem in problems(case):
        usual = attack(problem).radius
        best = min(attack(problem, seed=s, budget=AttackBudget(restarts=25, steps=100, rounds=2)).radius for s in (1,))
        assert_at_most(usual, 1.02 * best, what=f"{name} {problem.threat.key} {problem.goal.key}")


def test_same_seed_same_bits_whatever_the_batch() -> None:
    case = case_named("plain-h12-n6-d12")
    group = []
    for index in range(16):
        points = case.tokens.points + 0.05 * draw(*case.tokens.points.shape, seed=index)
        group.append(Problem(case.attention, TokenMeasure(points), FrobeniusBall(), Displacement(0.3)))
    other = case_named("causal")
    group.append(Problem(other.attention, other.tokens, PerTokenBall(), Displacement(0.1)))
    for epsilon in (None, 0.4):
        runs = [attack_many(group, epsilon=epsilon, seed=5, budget=QUICK, batch_size=size) for size in (1, 4, 16)]
        for rows in zip(*runs, strict=True):
            for row in rows[1:]:
                assert (row.problem, row.radius, row.usage, row.queries) == (
                    rows[0].problem, rows[0].radius, rows[0].usage, rows[0].queries,
                )  # fmt: skip
                assert_same_bits(row.perturbed, rows[0].perturbed)
        alone = attack(group[3], epsilon=epsilon, seed=5, budget=QUICK)
        assert alone.radius == runs[0][3].radius


def test_any_token_is_the_weakest_token() -> None:
    for name, goal in (("masses", Displacement(0.2)), ("causal-biases-strong", Displacement(0.05, pool="mean"))):
        case = case_named(name)
        problem = Problem(case.attention, case.tokens, AnyToken(), goal)
        singles = token_radii(problem)
        assert len(singles) == case.n
        for i, single in enumerate(singles):
            check_verified(Problem(case.attention, case.tokens, FrobeniusBall((i,)), goal), single)
            direct = attack(Problem(case.attention, case.tokens, FrobeniusBall((i,)), goal))
            assert single.radius == direct.radius  # bit for bit: a token does not see its companions
        weakest = min(single.radius for single in singles)
        result = attack(problem)
        assert_at_most(result.radius, 1.01 * weakest)
        assert int(((result.perturbed - case.tokens.points) != 0).any(dim=1).sum()) == 1


def test_token_radii_of_a_subset_with_an_epsilon() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.2))
    results = token_radii(problem, tokens=(1, 4), epsilon=0.3)
    for token, result in zip((1, 4), results, strict=True):
        check_verified(Problem(case.attention, case.tokens, FrobeniusBall((token,)), problem.goal), result)
    with pytest.raises(InputError, match="token 9 does not exist"):
        token_radii(problem, tokens=(9,))


# ---- the template ------------------------------------------------------------------------------------------------


def test_candidates_are_projected_measured_and_never_believed() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1))
    far, reading = 100.0 * draw(3, *case.tokens.points.shape), MovedTokens(problem)
    point = verify(reading, far, epsilon=0.01)
    assert point.perturbed is not None
    assert_at_most(point.radius, 0.01, rtol=1e-12)
    assert point.usage < 1.0
    broken = torch.full_like(far, math.nan)
    assert verify(reading, broken, epsilon=0.01).perturbed is None
    half = torch.cat([broken, far])
    assert verify(reading, half, epsilon=None).radius == verify(reading, far, epsilon=None).radius
    zero = verify(reading, torch.zeros_like(far), epsilon=None)
    assert zero.perturbed is None
    assert zero.radius == math.inf


def test_polishing_ends_on_the_violating_side() -> None:
    case = case_named("plain-h3-n8-d6")
    problem = Problem(case.attention, case.tokens, PerTokenBall(), Displacement(0.3))
    rays = draw(20, *case.tokens.points.shape) * torch.logspace(-2, 1, 20, dtype=torch.float64)[:, None, None]
    scaled, _ = shrink_to_boundary(problem.usage, rays)
    usage = problem.usage(scaled)
    assert bool((usage >= 1.0).all())
    assert bool((usage < 1.0 + 1e-7).all())


class Broken:
    """A network that is finite at the clean input and NaN or infinite everywhere else."""

    def __init__(self, value: float) -> None:
        self.width = self.out_width = 3
        self.value, self.digest = value, f"broken{value}"
        self.clean = draw(2, 3)

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        moved = (x - self.clean).flatten(-2).abs().amax(dim=-1)[..., None, None] > 0
        return torch.where(moved, self.value * x.sum(), x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_not_a_number_is_never_a_success(value: float, epsilon: float | None) -> None:
    network = Broken(value)
    problem = Problem(network, TokenMeasure(network.clean), FrobeniusBall(), Displacement(0.1))
    result = attack(problem, epsilon=epsilon, budget=QUICK)
    assert result.status in (Status.NAN, Status.NOT_FOUND)
    assert result.perturbed is None
    assert result.radius == math.inf


class Raises:
    """A network that fails on one batch of inputs."""

    def __init__(self, layer: Attention, poison: Tensor) -> None:
        self.layer, self.poison, self.armed = layer, poison, False
        self.width, self.out_width, self.digest = layer.width, layer.out_width, "raises" + layer.digest

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        if self.armed and x.ndim > 2 and float((x.detach().flatten(0, -3)[:1] - self.poison).abs().amin()) < 1e-2:
            raise RuntimeError("out of memory")
        return self.layer(x, mass)


def test_one_failing_input_does_not_lose_the_others() -> None:
    case = case_named("biases")
    points = [case.tokens.points + 10 * s for s in range(3)]
    network = Raises(case.attention, points[1])
    group = [Problem(network, TokenMeasure(x), FrobeniusBall(), Displacement(0.1)) for x in points]
    for problem in group:
        _ = problem.resolved
    network.armed = True
    results = attack_many(group, budget=QUICK)
    assert [r.status for r in results] == [Status.FOUND, Status.ERROR, Status.FOUND]
    assert "out of memory" in results[1].note


GOALS: tuple[Goal, ...] = (Displacement(1.0), Margin(draw(3, 4), pool="mean"))


@pytest.mark.parametrize("threat", [FrobeniusBall(), AnyToken(), Copies(2), CouplingBall(2)], ids=lambda t: t.key)
def test_query_budget_is_kept(threat: Threat) -> None:
    """Never more than named, whatever is counted; little is enough to find something."""
    case = case_named("plain-h4-n16-d8")
    for goal in GOALS if isinstance(threat, MoveThreat) else GOALS[:1]:
        problem = Problem(case.attention, case.tokens, threat, goal)
        for limit in (1, 4, 17, 60):
            result = attack(problem, budget=AttackBudget(restarts=8, steps=50, queries=limit))
            assert result.queries <= limit
            assert result.status in (Status.FOUND, Status.NOT_FOUND)
        assert result.status is Status.FOUND
        fixed = attack(problem, epsilon=0.1, budget=AttackBudget(queries=20))
        assert fixed.queries <= 20


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    case = case_named("plain-h4-n16-d8")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(1.0))
    free = attack(problem, budget=AttackBudget(steps=20))
    loose = attack(problem, budget=AttackBudget(steps=20, queries=100_000))
    assert (loose.radius, loose.queries) == (free.radius, free.queries)
    tight = attack(problem, budget=AttackBudget(steps=20, queries=60))
    check_verified(problem, tight)
    assert_at_most(tight.radius, 2.0 * free.radius)


def test_later_rounds_attack_classes_that_the_first_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight restarts start from four classes; the nearest one may be a class that the first order puts behind them."""
    case, seen = case_named("biases"), list[set[int]]()
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Margin(draw(11, 4), pool=1))

    def recorded(work: Search, evaluator: Evaluator, start: Start, *, steps: int) -> Finish:
        seen.append(set(start.targets.flatten().tolist()))
        return search_rows(work, evaluator, start, steps=steps)

    monkeypatch.setattr(token_moving, "search_rows", recorded)
    monkeypatch.setattr(token_moving, "FLAT", 0.0)  # no round is left out
    attack(problem, budget=AttackBudget(steps=10))
    first, second, third = seen
    assert len(first) == 4
    assert len(second - first) == 3
    assert len(third - first - second) == 3


def test_time_budget_ends_the_search() -> None:
    case = case_named("plain-h4-n16-d8")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(1.0))
    result = attack(problem, budget=AttackBudget(steps=10**6, seconds=1e-9))
    check_verified(problem, result)
    assert result.queries < 200


def test_bad_arguments_say_what_is_wrong() -> None:
    case = case_named("biases")
    problem = Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(1.0))
    with pytest.raises(InputError, match="epsilon must be a positive number; got -1"):
        attack(problem, epsilon=-1.0)
    with pytest.raises(InputError, match="got nan"):
        attack(problem, epsilon=math.nan)
    with pytest.raises(UnknownNameError, match="nearest: token-moving"):
        attack(problem, method="token-movng")
    with pytest.raises(InputError, match="restarts must be positive"):
        AttackBudget(restarts=0)
    with pytest.raises(InputError, match="batch_size"):
        attack_many([problem], batch_size=0)


def test_a_score_without_a_second_derivative_is_named() -> None:
    layer = KernelAttention(lambda x, y: -torch.cdist(x, y), "laplace", torch.eye(2).double())
    tokens = TokenMeasure(torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.raises(UnsupportedModelError, match="cannot be differentiated twice"):
        attack(Problem(layer, tokens, FrobeniusBall(), Displacement(0.1)))
