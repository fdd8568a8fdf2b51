"""Exported problems, as other programs read them: what they ask is what was asked."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnrobust as ar
from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError, UnsupportedThreatError
from attnrobust.interchange.box import Precision, Side
from attnrobust.interchange.export import ExportedProblem, export_problem
from attnrobust.interchange.vnnlib import VERSIONS, Version, decimal
from tests.assertions import shapes_unchecked
from tests.interchange.specifications import assertions, box, declared, read, satisfied

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHTS: dict[str, Any] = {name: draw(2, 4, 3, seed=seed) for seed, name in enumerate(("w_q", "w_k", "w_v"))}
LAYER = ar.Attention(**WEIGHTS, w_o=draw(2, 3, 5, seed=3), causal=True)
GOAL = ar.Margin(draw(3, 5, seed=4), draw(3, seed=5), pool="mean")
CLEAN = ar.TokenMeasure(draw(4, 4, seed=6))


def problem(threat: str = "per-token-linf", **changes: Any) -> ar.Problem:
    given: dict[str, Any] = {"network": LAYER, "clean": CLEAN, "threat": ar.parse_threat(threat), "goal": GOAL}
    return ar.Problem(**(given | changes))


def logits(told: ExportedProblem, x: Tensor) -> Tensor:
    """What onnxruntime gives at tokens, rounded to float32."""
    session = onnxruntime.InferenceSession(str(told.paths[0]), providers=["CPUExecutionProvider"])
    dtype = {"float32": np.float32, "float64": np.float64}[told.precision]
    (found,) = session.run(["Y"], {"X": x[None].numpy().astype(dtype)})
    return torch.from_numpy(found).double()


@pytest.fixture(scope="module")
def attacked() -> ar.AttackResult:
    """The nearest violation that moves every entry by at most its radius."""
    found = ar.attack(problem(), seed=0, budget=ar.AttackBudget(restarts=2, steps=20, rounds=1))
    assert found.status is ar.Status.FOUND
    return found


def test_a_violation_satisfies_the_file_and_the_clean_tokens_do_not(tmp_path: Path, attacked: ar.AttackResult) -> None:
    assert attacked.perturbed is not None
    told = export_problem(problem(), tmp_path, epsilon=1.02 * attacked.radius)
    text = read(told.paths[1])
    beyond = CLEAN.points + 1.01 * (attacked.perturbed - CLEAN.points)
    for x, breaks in ((CLEAN.points, False), (beyond, True)):
        x = x.float().double()
        assert satisfied(text, x, logits(told, x)) == (True, breaks)
    outside = CLEAN.points + 1.05 * (attacked.perturbed - CLEAN.points)
    assert not satisfied(text, outside, logits(told, outside))[0]
    assert (declared(text, "X"), declared(text, "Y")) == (16, 3)
    rivals = {f"Y_{c}" for c in range(3)} - {f"Y_{told.label}"}
    (broken,) = assertions(text)[1]
    assert {(part[1][0], part[1][1], part[1][2]) for part in broken[1:]} == {
        (">=", r, f"Y_{told.label}") for r in rivals
    }


def test_logits_are_those_of_the_problem_everywhere_in_the_box(tmp_path: Path) -> None:
    told = export_problem(problem("frobenius"), tmp_path, epsilon=2.0, box="enclosing")
    text, half = read(told.paths[1]), told.half_width
    for seed in range(5):
        x = (
            CLEAN.points + half * (2.0 * torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) - 1.0)
        ).float()
        wanted = GOAL.logits(LAYER(x.double()).mean(0))
        found = logits(told, x.double())
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
        margins = wanted[told.label] - wanted
        margins[told.label] = torch.inf
        assert satisfied(text, x.double(), found) == (True, bool(margins.min() <= 0.0))


@pytest.mark.parametrize(("side", "holds"), [("inscribed", True), ("enclosing", False)])
def test_the_sides(tmp_path: Path, side: Side, holds: bool) -> None:
    """Corners of the inscribed box are in the ball; those of the enclosing one are not."""
    threat = ar.FrobeniusBall()
    told = export_problem(problem("frobenius"), tmp_path, epsilon=0.5, box=side)
    upper = torch.tensor([float(high) for _, high in box(read(told.paths[1]))], dtype=torch.float64).reshape(4, 4)
    assert (float(threat.distance(upper - CLEAN.points)) <= 0.5) is holds
    assert ("within the radius" in told.sat, "within the radius" in told.unsat) == (holds, not holds)
    head = read(told.paths[1]).split("(", 1)[0]
    assert f"; box: {side}" in head
    assert f"; sat: {told.sat}\n; unsat: {told.unsat}\n" in head


@pytest.mark.parametrize("threat", ["per-token-linf", "per-token-linf:1"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_parser_of_the_standard_reads_the_same_question(tmp_path: Path, precision: Precision, threat: str) -> None:
    vnnlib = pytest.importorskip("vnnlib", reason="vnnlib, the parser of VNN-LIB 2.0, is not installed")
    texts: dict[Version, str] = {}
    for version in VERSIONS:
        options: dict[str, Any] = {"epsilon": 0.1, "precision": precision, "vnnlib_version": version}
        told = export_problem(problem(threat), tmp_path / version, **options)
        texts[version] = read(told.paths[1])
    compat = pytest.importorskip("vnnlib.compat")
    query = vnnlib.parse_query_string(texts["2.0"])
    (network,) = query.networks
    (x,), (y,) = network.inputs, network.outputs
    assert (x.name, x.shape, y.name, y.shape) == ("X", [1, 4, 4], "Y", [1, 3])
    assert str(x.dtype) == str(y.dtype) == {"float32": "DType.F32", "float64": "DType.F64"}[precision]
    (case,) = compat.transform(query)
    assert case.input_box == [(float(low), float(high)) for low, high in box(texts["1.0"])]
    rows = [part.coeff_matrix for part in case.output_constraints]
    rivals = [c for c in range(3) if c != told.label]
    assert rows == [[[float(c == told.label) - float(c == rival) for c in range(3)]] for rival in rivals]
    assert all(part.rhs == [0.0] for part in case.output_constraints)


def test_two_classes_and_one_row(tmp_path: Path) -> None:
    goal = ar.Margin(draw(2, 5, seed=7), pool=2)
    told = export_problem(problem(goal=goal), tmp_path, epsilon=0.1)
    label = told.label
    assert assertions(read(told.paths[1]))[1] == [[">=", f"Y_{1 - label}", f"Y_{label}"]]
    torch.testing.assert_close(logits(told, CLEAN.points)[0], goal.logits(LAYER(CLEAN.points)[2]), rtol=1e-5, atol=1e-5)


SIMPLE = r"\(assert \((<=|>=) [XY]_\d+ (-?\d+\.\d+|Y_\d+)\)\)"
CLAUSES = r"\(assert \(or( \(and \(>= Y_\d+ Y_\d+\)\))+\)\)"


@pytest.mark.parametrize("classes", [2, 3])
def test_every_line_is_one_that_the_simple_readers_of_the_competitions_take(tmp_path: Path, classes: int) -> None:
    """They match lines: declarations, one comparison of a variable, or a disjunction of conjunctions."""
    told = export_problem(problem(goal=ar.Margin(GOAL.weight[:classes])), tmp_path, epsilon=0.1)
    lines = [line for line in read(told.paths[1]).splitlines() if not line.startswith(";")]
    assert all(re.fullmatch(rf"\(declare-const [XY]_\d+ Real\)|{SIMPLE}|{CLAUSES}", line) for line in lines)
    assert len(lines) == 16 + classes + 2 * 16 + 1


def test_masses_are_part_of_the_network(tmp_path: Path) -> None:
    clean = ar.TokenMeasure(CLEAN.points, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    told = export_problem(problem(clean=clean), tmp_path, epsilon=0.1, precision="float64")
    wanted = GOAL.logits(clean.mass @ LAYER(clean.points, clean.mass))
    torch.testing.assert_close(logits(told, clean.points)[0], wanted, rtol=1e-12, atol=1e-12)
    assert told.difference <= 1e-12
    assert (told.rounded_weights, told.largest_rounding) == (0, 0.0)


def test_what_is_said_about_rounding(tmp_path: Path) -> None:
    told = export_problem(problem(), tmp_path, epsilon=0.1)
    assert 0 < told.rounded_weights < told.weights  # entries of the mask are numbers of float32
    assert 0.0 < told.largest_rounding <= 2.0**-24
    wanted = GOAL.logits(LAYER(CLEAN.points).mean(0))
    seen = float((logits(told, CLEAN.points)[0] - wanted).abs().max())
    assert seen <= 1e-5
    assert told.difference <= 1e-5
    single = replace(LAYER, **{name: getattr(LAYER, name).float() for name in ("w_q", "w_k", "w_v", "w_o")}, scale=0.5)
    goal = ar.Margin(GOAL.weight.float(), None, pool=0)
    exact = export_problem(problem(network=single, goal=goal), tmp_path / "exact", epsilon=0.1)
    assert exact.rounded_weights == 0
    assert "; network: problem.onnx, float32, weights exactly those of the problem" in read(exact.paths[1])


def test_the_record_is_on_disk(tmp_path: Path) -> None:
    told = export_problem(problem(), tmp_path / "new" / "place", epsilon=0.1, about={"text": "two\n línes; (x"})
    assert json.loads(read(told.paths[2])) == told.to_dict()
    for path in told.paths[:2]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == told.sha256[path.name]
    assert told.problem == problem().digest
    assert "; text: two l\\xednes; (x\n" in read(told.paths[1])
    again = export_problem(problem(), tmp_path / "again", epsilon=0.1, about={"text": "two\n línes; (x"})
    assert again.sha256 == told.sha256


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-45, 0.1, -1e-300, 3.4028234663852886e38])
def test_decimals_are_exact_and_have_no_exponent(value: float) -> None:
    text = decimal(value)
    assert Fraction(text) == Fraction(value)
    assert set(text) <= set("-0123456789.")
    assert "." in text
    assert text != "-0.0"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"goal": ar.Displacement(0.1, relative=True)}, {}, "displacement 10%.* bounds an l2 norm of the output"),
        ("frobenius", {}, "set of the threat frobenius is no box"),
        ("wasserstein:2", {"box": "enclosing"}, "does more than move tokens"),
        ("any-token", {"box": "inscribed"}, "token:I"),
        ({}, {"epsilon": -1.0}, "epsilon"),
    ],
)
def test_problems_without_a_file_are_refused(
    tmp_path: Path, changes: str | dict[str, Any], options: dict[str, Any], says: str
) -> None:
    asked = problem(changes) if isinstance(changes, str) else problem(**changes)
    with pytest.raises(InputError, match=says):
        export_problem(asked, tmp_path, **({"epsilon": 0.1} | options))
    assert list(tmp_path.iterdir()) == []


def test_other_attention_is_refused(tmp_path: Path) -> None:
    layer = ar.L2Attention(w_q=draw(2, 4, 2), w_v=draw(2, 4, 2))
    with pytest.raises(UnsupportedModelError, match="L2Attention is not exported"):
        export_problem(problem(network=layer, goal=ar.Margin(draw(2, 4))), tmp_path, epsilon=0.1)


class Sharper(ar.Margin):
    """Somebody's own goal."""


def test_a_subclass_of_the_goal_is_refused(tmp_path: Path) -> None:
    goal = Sharper(GOAL.weight, GOAL.bias)
    with pytest.raises(UnsupportedThreatError, match="margin"):
        export_problem(problem(goal=goal), tmp_path, epsilon=0.1)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for name, value in (("box", "inside"), ("precision", "half"), ("vnnlib_version", "3.0")):
        with shapes_unchecked(), pytest.raises(UnknownNameError, match=value):
            export_problem(problem(), tmp_path, epsilon=0.1, **{name: value})  # type: ignore[arg-type]


def test_files_are_not_replaced_unless_asked(tmp_path: Path) -> None:
    export_problem(problem(), tmp_path, epsilon=0.1)
    with pytest.raises(InputError, match="--overwrite"):
        export_problem(problem(), tmp_path, epsilon=0.2)
    assert export_problem(problem(), tmp_path, epsilon=0.2, overwrite=True).epsilon == 0.2
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no directory"):
        export_problem(problem(), tmp_path / "file", epsilon=0.2)


def test_a_decision_that_float32_loses_is_refused(tmp_path: Path) -> None:
    goal = ar.Margin(torch.eye(5, dtype=torch.float64)[:2], torch.tensor([1e9, 1e9], dtype=torch.float64), pool=0)
    asked = problem(goal=goal)
    with pytest.raises(InputError, match="take the precision float64"):
        export_problem(asked, tmp_path, epsilon=0.1)
    assert export_problem(asked, tmp_path, epsilon=0.1, precision="float64").label == asked.resolved.label


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"attnrobust\[onnx\]"):
        export_problem(problem(), tmp_path, epsilon=0.1)
