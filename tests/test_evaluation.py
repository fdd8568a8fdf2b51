"""Many inputs from Python: the numbers of the command line, from objects of any sort; what shows them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attnrobust import Displacement, Evaluation, FrobeniusBall, Margin, compare, evaluate, from_torch, read_results
from attnrobust.cli import run as cli
from attnrobust.errors import InputError
from attnrobust.problem import Problem
from attnrobust.runs.rows import Row, without_times
from attnrobust.status import Status
from attnrobust.tokens import TokenMeasure
from tests.layer_files import write_layer

CHEAP: dict[str, Any] = {"certificates": "displacement", "restarts": 1, "steps": 5}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_layer(tmp_path, np.random.default_rng(0), x2=2, x3=3)
    return tmp_path


@pytest.fixture
def module() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(4, 2, batch_first=True).eval()


def test_the_numbers_are_those_of_the_command(files: Path) -> None:
    arguments = ("compare", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--out", str(files / "o"), "-q")
    assert cli([*arguments, "--certificates", "displacement"]) == 0
    asked = evaluate(files / "layer.npz", tokens=files / "x.npz", certificates="displacement")
    stored = read_results(files / "o")
    assert [replace(r, row_id=None) for r in without_times(stored)] == without_times(asked)
    assert len(asked) == 2


@pytest.mark.parametrize("form", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["array", "tensor", "list"])
def test_tokens_in_every_form(module: nn.MultiheadAttention, form: Callable[[np.ndarray], object]) -> None:
    points = np.random.default_rng(1).normal(size=(3, 4))
    (row,) = evaluate(module, tokens=form(points), goal="5%", **CHEAP)
    measure = TokenMeasure(torch.as_tensor(points))
    problem = Problem(from_torch(module), measure, FrobeniusBall(), Displacement(0.05, relative=True))
    assert row.certified_radius == compare(problem, methods="displacement").certification.best.radius
    assert row.problem == problem.digest


def test_several_tokens_threats_goals_and_names(module: nn.MultiheadAttention) -> None:
    many = np.random.default_rng(1).normal(size=(2, 3, 4))
    layer = from_torch(module)
    margin = Margin(torch.eye(2, 4))
    found = evaluate(layer, tokens=many, threat=[FrobeniusBall(), "per-token"], goal=["10%", margin], **CHEAP)
    assert len(found) == 2 * 2 * 2
    assert {row.input_id for row in found} == {"0001", "0002"}
    assert {row.goal for row in found.select(threat="per-token")} == {"displacement 10%", margin.key}
    named = evaluate(layer, tokens={"first": many[0], "second": many[1, :2].tolist()}, **CHEAP)
    assert [(row.input_id, row.n) for row in named] == [("first", 3), ("second", 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of texts=, tokens= and images="),
        ({"tokens": np.eye(4), "texts": "A text."}, "exactly one"),
        ({"tokens": []}, "tokens"),
        ({"tokens": np.full((3, 4), np.nan)}, "NaN"),
        ({"texts": "A text."}, "no tokenizer"),
        ({"texts": ["A text.", " "]}, "give a text, a list of texts"),
        ({"images": np.eye(4)}, r"\(channels, height, width\)"),
        ({"tokens": np.eye(4), "threat": "l2"}, "did you mean frobenius"),
        ({"tokens": np.eye(4), "goal": "many"}, "tolerance 'many'"),
    ],
)
def test_what_cannot_be_read_is_one_line(module: nn.MultiheadAttention, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        evaluate(module, **options)
    assert "\n" not in str(raised.value)


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="give a name, a directory, load_model"):
        evaluate(3, tokens=np.eye(4))


# ---- what shows them -------------------------------------------------------------------------------------------------


def row(name: str = "a", **values: Any) -> Row:
    return replace(Row(name, "layer.0", 3, "frobenius", "displacement 10%", status=Status.FOUND), **values)


FOUND = row(certified_radius=0.12345678, certificate="displacement", attack_radius=0.23456712, gap=1.9000001)


def test_a_notebook_sees_bounds_on_their_safe_side_and_no_foreign_markup() -> None:
    html = Evaluation((FOUND, row("<b>", status=Status.ERROR)), "m")._repr_html_()
    assert "0.1234<" in html
    assert "0.2346<" in html
    assert "<b>" not in html
    many = Evaluation((FOUND,) * 30, "m")
    assert "10 more rows" in many._repr_html_()
    assert repr(many) == "<Evaluation: m: 30 rows, 30 found>"


def test_plain_values_are_json() -> None:
    values = Evaluation((FOUND, row("b", status=Status.ERROR)), "m").to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_an_unsound_row_is_named_first() -> None:
    found = Evaluation((FOUND, row("b", status=Status.UNSOUND)), "m")
    assert [one.input_id for one in found.unsound] == ["b"]
    assert "1 unsound" in found.summary().splitlines()[0]


def test_radii_of_several_threats_have_no_common_picture(tmp_path: Path) -> None:
    both = Evaluation((FOUND, replace(FOUND, threat="per-token")), "m")
    with pytest.raises(InputError, match="no common axis"):
        both.plot()
    with pytest.raises(InputError, match="no row has"):
        both.select(threat="any-token")
    picture = both.select(threat="per-token").plot("curve")
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert picture.save(tmp_path / "a.png").read_bytes() == picture.png
    with pytest.raises(InputError, match=r"ends in \.png"):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(InputError, match="give 'gap' or 'curve'"):
        both.select(threat="per-token").plot("pie")


def test_a_data_frame_has_a_column_for_every_certificate(module: nn.MultiheadAttention) -> None:
    pandas = pytest.importorskip("pandas")
    found = evaluate(module, tokens=np.random.default_rng(1).normal(size=(2, 3, 4)), **CHEAP)
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["certified:displacement"]) == [one.certified_radius for one in found]
    assert not {"certificates", "skipped", "tokens"} & set(frame.columns)
