"""Attacks and certificates stay on the device of their problem: on a played GPU they give the CPU's numbers."""

from collections.abc import Iterator

import pytest
import torch
from _pytest.mark import ParameterSet

from attnrobust.attacks import AttackBudget, AttackMethod
from attnrobust.attacks import attack as run_attack
from attnrobust.certify import CertificateMethod
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.runs.inputs import on_device
from tests.cases import cases, problems
from tests.methods import MOVING_ATTACKS, MOVING_METHODS
from tests.played_gpu import GPU, MixedDevicesError, played_gpu

NAMES = ("plain-h2-n3-d4", "causal-masses", "biases", "finite-mask-masses", "single-token-biases", "large-norms")
SLOW = ("margin-majorant", "displacement")
"""Tens of thousands of small operations, and the played device takes its time for each."""

BUDGET = AttackBudget(restarts=2, steps=3, rounds=1)
ROUNDING = 1e-9
"""Matrix products are cut into other pieces on the played GPU; nothing searches long enough to enlarge that further."""


def posed() -> Iterator[ParameterSet]:
    """Problems of several cases; all but one for each kind of goal of the first case are slow tests."""
    for case in cases():
        if case.name in NAMES:
            goals: set[type] = set()
            for index, problem in enumerate(problems(case)):
                quick = case.name == NAMES[0] and type(problem.goal) not in goals
                goals.add(type(problem.goal))
                name = f"{case.name}-{index}-{type(problem.goal).__name__}"
                yield pytest.param(problem, id=name, marks=[] if quick else [pytest.mark.slow])


each_problem = pytest.mark.parametrize("problem", tuple(posed()))


def moved(problem: Problem, device: torch.device) -> Problem:
    """The same problem on another device."""
    tokens, goal = on_device(problem.clean, problem.goal, device)
    assert isinstance(problem.network, Attention)
    return Problem(problem.network.to(device), tokens, problem.threat, goal)


def test_the_played_gpu_refuses_what_a_real_one_refuses() -> None:
    generator = torch.Generator().manual_seed(0)
    with played_gpu() as gpu:
        there, here = torch.ones(3, device=gpu), torch.ones(3)
        assert there.device == (there + 1.0).device == (there * here.sum()).device == there[here > 0].device == gpu
        assert (there + here.to(gpu)).tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(MixedDevicesError, match="are on the CPU"):
            there + here
        with pytest.raises(MixedDevicesError, match="are on the CPU"):
            torch.stack([there, here])
        with pytest.raises(MixedDevicesError, match="an index on the GPU"):
            here[there > 0]
        with pytest.raises(MixedDevicesError, match="a generator of the CPU"):
            torch.randn(3, generator=generator, device=gpu)
        with pytest.raises(RuntimeError):
            there.numpy()
        there.requires_grad_()
        assert torch.autograd.grad((there**2).sum(), there)[0].tolist() == [2.0, 2.0, 2.0]


each_method = pytest.mark.parametrize(
    "method",
    [pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.name in SLOW else []) for m in MOVING_METHODS],
)


@each_method
@each_problem
@pytest.mark.one_in(2)
def test_certificates(method: CertificateMethod, problem: Problem) -> None:
    refused = method.refuses(problem)
    expected = None if refused else method.certify(problem, seed=0)
    with played_gpu():
        there = moved(problem, GPU)
        assert there.digest == problem.digest
        assert method.refuses(there) == refused
        if expected is not None:
            assert method.certify(there, seed=0).radius == pytest.approx(expected.radius, rel=ROUNDING)


@pytest.mark.parametrize("attack", MOVING_ATTACKS, ids=lambda attack: attack.name)
@each_problem
def test_attacks(attack: AttackMethod, problem: Problem) -> None:
    expected = run_attack(problem, method=attack.name, seed=0, budget=BUDGET)
    with played_gpu():
        found = run_attack(moved(problem, GPU), method=attack.name, seed=0, budget=BUDGET)
        assert found.status == expected.status
        assert found.radius == pytest.approx(expected.radius, rel=ROUNDING)
        assert found.perturbed is None or found.perturbed.device == GPU
