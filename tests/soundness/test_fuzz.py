"""Calls with right and wrong arguments end in a right answer or in an error of one line.

In a process of its own: here the import hook would refuse wrong types before the package does, as no user sees it.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import attnrobust as ar
from attnrobust.cli.output import say
from attnrobust.errors import InputError
from tests.assertions import refused, shapes_unchecked

ROOT = Path(__file__).parents[2]
FIRST, CALLS = 10_000, 60
WEIGHT = 0.1 * torch.eye(2)[None]
LAYER = ar.Attention(WEIGHT, WEIGHT, WEIGHT)
TOKENS = ar.TokenMeasure(torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
PROBLEM = ar.Problem(LAYER, TOKENS, ar.FrobeniusBall(), ar.Displacement(0.1))


def test_no_traceback_and_no_lost_row(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--first", str(FIRST), "--calls", str(CALLS), "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = Counter(call["outcome"] for call in json.loads(out.read_text(encoding="utf-8"))["calls"])
    assert set(counts) == {"clean error", "right answer"}  # both kinds of arguments are drawn
    assert counts.total() == CALLS


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "problem": (lambda: ar.certify(None), "the problem is a NoneType"),  # type: ignore[arg-type]
    "attacked problem": (lambda: ar.attack(3), "the problem is a int"),  # type: ignore[arg-type]
    "problems": (lambda: ar.attack_many([PROBLEM, "x"]), "the problem is a str"),  # type: ignore[list-item]
    "batch size": (lambda: ar.attack_many([PROBLEM], batch_size=1.5), "batch_size is 1.5"),  # type: ignore[arg-type]
    "layer": (lambda: ar.Problem(ar.Attention, TOKENS, "frobenius", "10%"), "the layer is the class Attention"),  # type: ignore[arg-type]
    "threat": (lambda: ar.Problem(LAYER, TOKENS, 3, "10%"), "the threat is 3"),  # type: ignore[arg-type]
    "weight": (lambda: ar.Attention(WEIGHT, WEIGHT, None), "w_v is None"),  # type: ignore[arg-type]
    "budget": (lambda: ar.attack(PROBLEM, budget="cheap"), "the budget is 'cheap'"),  # type: ignore[arg-type]
    "steps": (lambda: ar.AttackBudget(steps="2"), "attack budget: steps is '2'"),  # type: ignore[arg-type]
    "attack": (lambda: ar.attack(PROBLEM, method=5), "unknown attack 5"),  # type: ignore[arg-type]
    "certificate": (lambda: ar.certify(PROBLEM, methods=[None]), "unknown certificate None"),  # type: ignore[list-item]
    "certificates": (lambda: ar.certify(PROBLEM, methods=5), "methods is 5"),  # type: ignore[arg-type]
    "seed": (lambda: ar.certify(PROBLEM, seed=2**64), "seed is 18446744073709551616"),
    "epsilon": (lambda: ar.attack(PROBLEM, epsilon=10**400), "epsilon is 1000"),
    "order": (lambda: ar.CouplingBall(torch.ones(2)), "order is tensor"),  # type: ignore[arg-type]
    "domain": (lambda: ar.CouplingBall(2, domain_radius=b"1"), "the domain radius is b'1'"),  # type: ignore[arg-type]
    "copies": (lambda: ar.Copies(1.5), "copies is 1.5"),  # type: ignore[arg-type]
    "center": (lambda: ar.lipschitz_search(LAYER, "x", 1.0), "the center is a str"),  # type: ignore[arg-type]
    "norm": (lambda: ar.lipschitz_search(LAYER, TOKENS.points, 1.0, norm={}), "unknown norm '{}'"),  # type: ignore[arg-type]
    "search": (lambda: ar.bounds_table(LAYER, n=2, radius=1.0, search=0.5), "search .steps. is 0.5"),  # type: ignore[arg-type]
    "radius": (lambda: ar.contraction(LAYER, radius="1"), "radius is '1'"),  # type: ignore[arg-type]
    "token": (lambda: ar.token_radii(PROBLEM, tokens="a"), "tokens are 'a'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    call, words = WRONG[name]
    with shapes_unchecked(), refused(InputError, words):
        call()


def test_names_are_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb\x1b[31m\u202e: broken")
    assert capsys.readouterr().err == "attnrobust: a b\\x1b[31m\\u202e: broken\n"


def test_a_negative_seed_starts_a_bound() -> None:
    assert ar.bounds_table(LAYER, TOKENS, seed=-1, search=0).bounds
