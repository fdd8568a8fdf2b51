"""Speed of an attack step on MiniLM's layer (n = 128, 12 heads, 16 restarts) beside plain PyTorch and foolbox.

All on the same problem in the same run: a forward and backward pass of the same batch is the yardstick, and the target
for our step is 1.3 of it. ``extra_info`` holds the ratio of process times, taken in turns so that a busy machine slows
both sides alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from attnrobust.attacks import AttackBudget
from attnrobust.attacks.foolbox.library import Misclassification, QueryModel, attacks
from attnrobust.attacks.method import Search
from attnrobust.attacks.search.evaluate import Evaluator, search_threat
from attnrobust.attacks.search.projected_gradient import Start, search_rows
from attnrobust.goals import Margin
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.pretrained import minilm_layer

TOKENS, RESTARTS, STEPS, TURNS = 128, 16, 5, 5
TARGET = 1.3


@dataclass(frozen=True, eq=False)
class Setting:
    """The problem and a batch of moved tokens."""

    problem: Problem
    moves: Tensor

    def logits(self, moves: Tensor, *, fused: bool = True) -> Tensor:
        """Two scores of each moved input through PyTorch's own operations, as a user would write them."""
        layer, points = self.problem.network, self.problem.clean.points + moves
        b, n, _ = points.shape
        heads = [w.transpose(0, 1).flatten(1) for w in (layer.w_q, layer.w_k, layer.w_v)]  # type: ignore[attr-defined]
        biases = [b.flatten() for b in (layer.b_q, layer.b_k, layer.b_v)]  # type: ignore[attr-defined]
        q, k, v = (
            torch.nn.functional.linear(points, w.mT, bias).view(b, n, layer.heads, -1).transpose(1, 2)  # type: ignore[attr-defined]
            for w, bias in zip(heads, biases, strict=True)
        )
        if fused:
            heads_out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            heads_out = torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, dim=-1) @ v
        mixed = heads_out.transpose(1, 2).reshape(b, n, -1)
        excess = self.problem.resolved.changes(mixed @ layer.w_o.flatten(0, 1)) / self.problem.resolved.budgets - 1.0  # type: ignore[attr-defined]
        return torch.cat([torch.zeros_like(excess), excess], dim=1)


@pytest.fixture(scope="module")
def setting() -> Setting:
    layer, points = minilm_layer(2, TOKENS)
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(12, 32, 384, generator=generator, dtype=torch.float64) / 384**0.5
    layer = replace(layer, w_o=out)
    readout = torch.randn(2, 384, generator=generator, dtype=torch.float64)
    problem = Problem(layer, TokenMeasure(points), FrobeniusBall(), Margin(readout))
    moves = 0.01 * torch.randn(RESTARTS, TOKENS, 384, generator=generator, dtype=torch.float64)
    plain = Setting(problem, moves)
    with torch.no_grad():
        ours = problem.usage(moves) - 1.0
        torch.testing.assert_close(plain.logits(moves)[:, 1], ours, rtol=1e-9, atol=1e-9)
    return plain


def forward_and_backward(setting: Setting) -> Tensor:
    """The yardstick."""
    moves = setting.moves.clone().requires_grad_(True)
    setting.logits(moves)[:, 1].sum().backward()
    assert moves.grad is not None
    return moves.grad


def our_steps(setting: Setting) -> Callable[[], object]:
    """Steps of token moving from the batch (a search drops rows as it goes; here all of them take every step)."""
    evaluator = Evaluator([setting.problem], memory_bytes=1 << 30)
    search = Search(
        evaluator=evaluator, threat=search_threat(setting.problem.moves), epsilon=3.0, seeds=(0,), budget=AttackBudget()
    )
    start = Start(
        setting.moves[None],
        torch.zeros(1, RESTARTS, dtype=torch.int64),
        torch.full((1, RESTARTS), 3.0, dtype=torch.float64),
        torch.ones(1, RESTARTS, TOKENS, dtype=torch.bool),
        search.threat,
    )

    @torch.no_grad()
    def run() -> object:
        return search_rows(search, evaluator, start, steps=STEPS, finalists=RESTARTS)

    return run


def foolbox_steps(setting: Setting) -> Callable[[], object]:
    """Steps of foolbox's L2 PGD on the same scores."""
    model = QueryModel(setting.logits, box=float("inf"))
    pgd = attacks.L2PGD(steps=STEPS, rel_stepsize=0.1)
    labels = Misclassification(torch.zeros(RESTARTS, dtype=torch.int64))
    zero = torch.zeros_like(setting.moves)
    return lambda: pgd.run(model, zero, labels, epsilon=3.0)


def func_gradients(setting: Setting) -> Callable[[], Tensor]:
    """Gradients of every row by torch.func, which has no rule for the fused attention."""
    gradient: Callable[[Tensor], Tensor] = torch.func.vmap(
        torch.func.grad(lambda move: setting.logits(move[None], fused=False)[0, 1])
    )
    return lambda: gradient(setting.moves)


def ratio(first: Callable[[], object], second: Callable[[], object], *, steps: int) -> float:
    """Least process time of a step of the first over that of one run of the second."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for call, times, runs in ((first, seconds[0], 1), (second, seconds[1], steps)):
            for _ in range(runs):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
    return min(seconds[0]) / steps / min(seconds[1])


def measure(benchmark: BenchmarkFixture, run: Callable[[], object]) -> None:
    benchmark.pedantic(run, rounds=TURNS, warmup_rounds=1)  # type: ignore[no-untyped-call]


def test_forward_and_backward_of_plain_pytorch(benchmark: BenchmarkFixture, setting: Setting) -> None:
    measure(benchmark, lambda: forward_and_backward(setting))


@pytest.mark.parametrize("who", [our_steps, foolbox_steps], ids=["token-moving", "foolbox-L2PGD"])
def test_steps(benchmark: BenchmarkFixture, setting: Setting, who: Callable[[Setting], Callable[[], object]]) -> None:
    run = who(setting)
    benchmark.extra_info.update(
        steps=STEPS,
        target=TARGET,
        one_step_over_forward_and_backward=ratio(run, lambda: forward_and_backward(setting), steps=STEPS),
    )
    measure(benchmark, run)


def test_gradients_of_torch_func(benchmark: BenchmarkFixture, setting: Setting) -> None:
    run = func_gradients(setting)
    torch.testing.assert_close(run(), forward_and_backward(setting), rtol=1e-9, atol=1e-12)
    benchmark.extra_info["over_forward_and_backward"] = ratio(run, lambda: forward_and_backward(setting), steps=1)
    measure(benchmark, run)
