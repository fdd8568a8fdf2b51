"""Closed-form value, pullback and pushforward of the attacks' evaluator against autograd."""

import pytest
import torch
from torch import Tensor

from attnrobust.attacks.search.evaluate import Evaluator, group_key
from attnrobust.attacks.search.pullback import PreparedAttention
from attnrobust.goals import Displacement
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_close, assert_same_bits
from tests.cases import Case, case_named, goals, problems

MEMORY = 1 << 28


class Wrapped:
    """The same layer behind the plain interface, so that the evaluator has to use autograd."""

    def __init__(self, case: Case) -> None:
        self._layer = case.attention
        self.width, self.out_width = case.attention.width, case.attention.out_width
        self.digest = "wrapped" + case.attention.digest

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        return self._layer(x, mass)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(problem: Problem, delta: Tensor, target: int) -> tuple[Tensor, Tensor]:
    delta = delta.clone().requires_grad_()
    output = problem.network(problem.clean.points + delta, problem.mass)
    shares = problem.resolved.changes(output) / problem.resolved.violated_at
    (gradient,) = torch.autograd.grad(shares[..., target].sum(), delta)
    return shares.detach(), gradient


def test_shares_and_gradient_are_autograds(case: Case) -> None:
    for problem in problems(case):
        evaluator = Evaluator([problem], memory_bytes=MEMORY)
        delta = 0.3 * draw(3, *case.tokens.points.shape)
        classes = problem.resolved.violated_at.shape[0]
        target = torch.arange(3) % classes
        shares, gradient = evaluator.shares_and_gradient(delta[None], target[None])
        for row in range(3):
            expected, slope = by_autograd(problem, delta[row], int(target[row]))
            assert_close(shares[0, row], expected, rtol=1e-9, atol=1e-11)
            assert_close(gradient[0, row], slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()) + 1e-13)
        assert_close(evaluator.usage(delta[None])[0], problem.usage(delta), rtol=1e-9, atol=1e-11)
        assert evaluator.queries.tolist() == [6]


def test_normal_product_is_the_dense_one(case: Case) -> None:
    for goal in goals(case)[:3]:
        for network in (case.attention, Wrapped(case)):
            problem = Problem(network, case.tokens, next(problems(case)).threat, goal)
            evaluator = Evaluator([problem], memory_bytes=MEMORY)
            vectors = draw(2, *case.tokens.points.shape)

            def pooled(x: Tensor, problem: Problem = problem) -> Tensor:
                return problem.resolved.pooled(problem.network(x, problem.mass)).flatten()

            dense = torch.func.jacrev(pooled)(case.tokens.points).flatten(1) / problem.resolved.violated_at[0]
            expected = vectors.flatten(1) @ dense.T @ dense
            scale = float(expected.abs().max()) + 1e-12
            got = evaluator.normal_product(vectors[None])[0].flatten(1)
            assert_close(got, expected, rtol=0, atol=1e-11 * scale)


def test_a_plain_network_gives_the_same_numbers() -> None:
    case = case_named("finite-mask-masses")
    for goal in goals(case):
        threat = next(problems(case)).threat
        fast = Evaluator([Problem(case.attention, case.tokens, threat, goal)], memory_bytes=MEMORY)
        plain = Evaluator([Problem(Wrapped(case), case.tokens, threat, goal)], memory_bytes=MEMORY)
        assert plain.prepared is None
        delta = 0.3 * draw(1, 4, *case.tokens.points.shape)
        target = torch.zeros(1, 4, dtype=torch.int64)
        for a, b in zip(fast.shares_and_gradient(delta, target), plain.shares_and_gradient(delta, target), strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert_close(fast.shares(delta), plain.shares(delta), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["plain-h12-n6-d12", "key-wider-than-value", "masses-long", "causal", "biases-12-heads"]
)
def test_a_problem_does_not_see_its_companions(name: str) -> None:
    """Bit-equal: products are done per problem, chunks are cut along the restarts only."""
    case = case_named(name)
    problem = next(problems(case))
    others = [
        Problem(
            problem.network,
            type(case.tokens)(case.tokens.points + 0.1 * s, case.tokens.mass),
            problem.threat,
            problem.goal,
        )
        for s in range(1, 16)
    ]
    group = [problem, *others]
    assert len({group_key(p) for p in group}) == 1
    delta = 0.3 * draw(16, 5, *case.tokens.points.shape)
    target = torch.zeros(16, 5, dtype=torch.int64)
    whole = Evaluator(group, memory_bytes=MEMORY).shares_and_gradient(delta, target)
    for size in (1, 4):
        parts = [
            Evaluator(group[i : i + size], memory_bytes=MEMORY).shares_and_gradient(
                delta[i : i + size], target[i : i + size]
            )
            for i in range(0, 16, size)
        ]
        for index in (0, 1):
            assert_same_bits(torch.cat([p[index] for p in parts]), whole[index], what=f"batch size {size}")


def test_chunks_only_cut_memory() -> None:
    case = case_named("plain-h8-n12-d8")
    problem = next(problems(case))
    delta = 0.3 * draw(1, 7, *case.tokens.points.shape)
    target = torch.zeros(1, 7, dtype=torch.int64)
    whole = Evaluator([problem], memory_bytes=MEMORY).shares_and_gradient(delta, target)
    tiny = Evaluator([problem], memory_bytes=1)
    cut = tiny.shares_and_gradient(delta, target)
    for a, b in zip(whole, cut, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert tiny.queries.tolist() == [7]


def test_batches_of_problems_stay_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("plain-h8-n12-d8")
    group = [Problem(case.attention, case.tokens, FrobeniusBall(), Displacement(0.1 * (i + 1))) for i in range(5)]
    delta = 0.3 * draw(5, 3, *case.tokens.points.shape)
    target = torch.zeros(5, 3, dtype=torch.int64)
    whole = Evaluator(group, memory_bytes=MEMORY)
    largest: list[int] = []
    forward = PreparedAttention.forward

    def watched(self: PreparedAttention, x: Tensor) -> object:
        largest.append(x.shape[0] * x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(PreparedAttention, "forward", watched)
    for rows in (2, 7):  # two restarts of one problem; two problems with all their restarts
        largest.clear()
        part = Evaluator(group, memory_bytes=rows * whole.bytes_of_a_row)
        found = (part.shares(delta), *part.shares_and_gradient(delta, target), part.normal_product(delta))
        assert max(largest) <= rows
        assert part.queries.tolist() == [9] * 5
        if rows == 7:  # cut between problems only: the same bits
            expected = (whole.shares(delta), *whole.shares_and_gradient(delta, target), whole.normal_product(delta))
            for a, b in zip(found, expected, strict=True):
                assert_same_bits(a, b)


def test_no_gradient_reaches_the_weights() -> None:
    case = case_named("biases")
    weight = case.attention.w_q
    problem = next(problems(case))
    evaluator = Evaluator([problem], memory_bytes=MEMORY)
    evaluator.shares_and_gradient(draw(1, 2, *case.tokens.points.shape), torch.zeros(1, 2, dtype=torch.int64))
    assert weight.grad is None
    assert not weight.requires_grad
