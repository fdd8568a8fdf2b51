"""The fixture for users' tests."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.models.read_network import read_network
from attnrobust.pytest_plugin import CertifiedAssertion
from attnrobust.tokens import TokenMeasure
from tests.models.networks.models import HEADS, inputs_of
from tests.test_comparison import linear_problem

assert_certified = CertifiedAssertion()


def test_a_radius_that_is_certified_passes() -> None:
    """One token, linear layer: the robust radius is tolerance / 2 = 0.25."""
    problem = linear_problem()
    best = assert_certified(problem.network, problem.clean, radius=0.01, tolerance=0.5)
    assert 0.01 <= best.radius <= 0.25 * (1 + 1e-12)
    assert_certified(problem.network, problem.clean.points, radius=best.radius, tolerance="0.5")


def test_a_radius_that_is_not_certified_fails_with_the_figures() -> None:
    problem = linear_problem()
    with pytest.raises(pytest.fail.Exception, match=r"is below 0\.26 for displacement 0\.5, frobenius, n = 1; all: "):
        assert_certified(problem.network, problem.clean, radius=0.26, tolerance=0.5)


def test_torch_modules_are_read_by_their_adapter() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    assert_certified(module, torch.randn(3, 4), radius=1e-9, threat="any-token")
    assert next(module.parameters()).dtype == torch.float32  # the user's module is not converted


def test_what_cannot_be_read_is_an_error_not_a_failure() -> None:
    with pytest.raises(UnsupportedModelError, match="train mode"):
        assert_certified(nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), torch.randn(3, 4), radius=1e-9)
    problem = linear_problem()
    with pytest.raises(InputError, match="tolerance"):
        assert_certified(problem.network, TokenMeasure(problem.clean.points), radius=0.1, tolerance="lots")


def test_a_whole_model_by_its_decision() -> None:
    read = read_network(HEADS["bert sequence"](), inputs_of("bert"), at="block:1")
    with pytest.raises(pytest.fail.Exception, match=r"is below 1e\+06 for decision, frobenius, n = 9"):
        assert_certified(read, radius=1e6, goal="decision", methods="network-product")
    with pytest.raises(pytest.fail.Exception, match=r"is below 1e\+06 for displacement 10%"):
        assert_certified(read, radius=1e6, methods="network-product")


def test_goals_that_do_not_fit_are_errors() -> None:
    problem = linear_problem()
    read = read_network(HEADS["bert sequence"](), inputs_of("bert"), at="block:1")
    cases: list[tuple[Any, Any, Any, Any, str]] = [
        (problem.network, problem.clean, "decision", None, "give attnrobust.read_network"),
        (problem.network, None, None, "1%", "give the tokens"),
        (read, problem.clean, "decision", None, "leave the tokens out"),
        (read, None, "decision", "1%", "exclude each other"),
        (read, None, "decison", None, "nearest: decision"),
    ]
    for layer, x, goal, tolerance, says in cases:
        with pytest.raises(InputError, match=says):
            assert_certified(layer, x, radius=0.1, goal=goal, tolerance=tolerance)


def test_a_readout_of_a_file(tmp_path: Path) -> None:
    problem = linear_problem()
    width = problem.network(problem.clean.points, problem.clean.mass).shape[-1]
    path = tmp_path / "readout.npz"
    np.savez(path, weight=np.eye(2, width), bias=np.array([5.0, 0.0]))
    asked: dict[str, Any] = {"readout": path, "pool": "row:0", "label": 0, "methods": "castin2024-derived"}
    best = assert_certified(problem.network, problem.clean, radius=0.0, **asked)
    with pytest.raises(pytest.fail.Exception, match="for margin row:0 label:0"):
        assert_certified(problem.network, problem.clean, radius=best.radius + 1e6, **asked)
    for wrong in ({"readout": path, "tolerance": 0.5}, {"pool": "mean"}, {"label": 1, "tolerance": 0.5}):
        options: dict[str, Any] = wrong
        with pytest.raises(InputError, match="readout"):
            assert_certified(problem.network, problem.clean, radius=0.1, **options)


def test_only_kinds_that_are_asked_for_count() -> None:
    problem = linear_problem()
    best = assert_certified(problem.network, problem.clean, radius=0.01, tolerance=0.5, kinds="float64")
    assert best.kind == "float64"
    asked: dict[str, Any] = {"radius": 0.01, "tolerance": 0.5, "methods": best.method}
    with pytest.raises(pytest.fail.Exception, match=r"certified radius of kind rigorous nothing is below 0\.01"):
        assert_certified(problem.network, problem.clean, kinds=("rigorous",), **asked)
    with pytest.raises(UnknownNameError, match="rigorous"):
        assert_certified(problem.network, problem.clean, kinds="rigorus", **asked)


def test_an_attack_says_whether_more_can_be_certified_at_all() -> None:
    """The robust radius is 0.25."""
    problem = linear_problem()
    with pytest.raises(pytest.fail.Exception, match=r"; the attack breaks it at 0\.25"):
        assert_certified(problem.network, problem.clean, radius=0.26, tolerance=0.5, attack="token-moving")
    assert_certified(problem.network, problem.clean, radius=0.01, tolerance=0.5, max_gap=1e6)
    with pytest.raises(pytest.fail.Exception, match=r"the gap is .*, not at most 0\.5"):
        assert_certified(problem.network, problem.clean, radius=0.01, tolerance=0.5, max_gap=0.5)


def test_in_a_project_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["attnrobust.pytest_plugin"]\n', encoding="utf-8")
    (tmp_path / "test_mine.py").write_text(
        "import torch\n"
        "from attnrobust import Attention\n"
        "w = torch.eye(2, dtype=torch.float64)[None]\n"
        "layer, x = Attention(w_q=w, w_k=w, w_v=w), torch.ones(1, 2, dtype=torch.float64)\n"
        "def test_good(assert_certified): assert_certified(layer, x, radius=0.01, tolerance=0.5)\n"
        "def test_bad(assert_certified): assert_certified(layer, x, radius=0.51, tolerance=0.5)\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout
    assert "is below 0.51" in done.stdout
