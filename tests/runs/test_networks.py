"""Whole models in runs: the goals, the depths, what a row's name and digest say, and the model's own word."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnrobust.errors import AlreadyViolatedError, InputError, UnknownNameError
from attnrobust.models.networks.confirmation import Confirmation
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.results import AttackResult
from attnrobust.runs import evaluate
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.networks import NetworkGoal, Networks, matching_depths
from attnrobust.runs.plan import meaning
from attnrobust.runs.rows import Row, depth_place, row_from_dict, scopes
from attnrobust.runs.run import resume, run
from attnrobust.runs.storage.files import rows_digest
from attnrobust.runs.work import Workbench
from attnrobust.status import Status
from attnrobust.threats.moves import FrobeniusBall
from tests.cli.test_goals import with_head
from tests.runs.storage.test_files import FULL
from tests.runs.test_depths import whole
from tests.runs.test_run import NO_SHARD


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_head(tmp_path_factory.mktemp("classifier"), "bert sequence")
    (folder / "texts.txt").write_text("w3 w5 w7\nw8 w2\n", encoding="utf-8")
    (folder / "anchors.txt").write_text("w3 w4\nw9 w2 w2\n", encoding="utf-8")
    return folder


def configured(folder: Path, **changes: Any) -> RunConfig:
    values = {
        "model": str(folder),
        "texts": folder / "texts.txt",
        "at": ["*"],
        "goals": ["decision", {"goal": "pooled", "tolerance": "1%"}],
        "certificates": ["castin2024-reported"],
        "attack": {"restarts": 1, "steps": 4, "queries": 60},
    }
    return make_config(values | changes)


@pytest.fixture(scope="module")
def rows(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    config = configured(classifier, output=tmp_path_factory.mktemp("run") / "out")
    return run(config, shard=NO_SHARD).store.rows()


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_depth_and_goal_has_its_row_in_the_models_order(rows: list[Row]) -> None:
    assert [(row.layer, row.goal) for row in rows[:4]] == [
        ("embeddings", "decision"),
        ("embeddings", "pooled 1%"),
        ("block:1", "decision"),
        ("block:1", "pooled 1%"),
    ]
    assert len({row.row_id for row in rows}) == len({row.problem for row in rows}) == 8
    assert all(row.depth == depth_place(row.layer) for row in rows)
    assert all(row.tokens and len(row.token_moves) in (0, len(row.tokens)) for row in rows)


def test_a_rows_problem_is_that_of_read_network(rows: list[Row], classifier: Path) -> None:
    for row in (rows[0], rows[2]):
        assert row.text is not None
        read = read_network(classifier, row.text, at=row.layer)
        network, goal = read.decision()
        problem = Problem(network, read.input.measure, FrobeniusBall(), goal)
        assert problem.digest == row.problem
        assert row.label == read.info.labels[problem.resolved.label or 0]


def test_a_run_of_a_whole_model_goes_on(classifier: Path, tmp_path: Path) -> None:
    config = configured(classifier, output=tmp_path / "out", at="block:1", goals="decision")
    first = run(config, shard=NO_SHARD)
    for part in first.store.parts():
        part.unlink()
    again = resume(tmp_path / "out", shard=NO_SHARD)
    assert (first.computed, again.computed, again.remaining) == (2, 2, 0)
    with pytest.raises(InputError, match="holds another run: layers was"):
        run(configured(classifier, output=tmp_path / "out", at="embeddings", goals="decision"), shard=NO_SHARD)


@pytest.mark.slow
def test_workers_give_the_same_rows(classifier: Path, tmp_path: Path) -> None:
    config = configured(classifier, output=tmp_path / "a", at="block:1", goals="decision")
    pooled = configured(classifier, output=tmp_path / "b", at="block:1", goals="decision", execution={"workers": 1})
    here, there = (run(each, shard=NO_SHARD).store.rows() for each in (config, pooled))
    assert rows_digest(here) == rows_digest(there)


def test_the_digest_of_a_run_has_depth_head_and_anchors(classifier: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"goals": "decision", "at": "embeddings"},
        {"goals": "decision", "at": "block:1"},
        {"goals": "pooled", "at": "block:1"},
        {"goals": "hidden", "at": "block:1"},
        {"goals": {"goal": "hidden", "tolerance": "1%"}, "at": "block:1"},
        {"goals": {"goal": "hidden", "row": 1}, "at": "block:1"},
        {"goals": {"goal": "nearest", "anchors": classifier / "anchors.txt"}, "at": "block:1"},
    ]
    meanings = [json.dumps(meaning(Workbench(configured(classifier, **each))), sort_keys=True) for each in asked]
    assert len(set(meanings)) == len(asked)
    one = NetworkGoal("nearest", anchors=("a", "b"))
    assert one.digest != replace(one, anchors=("a", "c")).digest
    assert one.key == "nearest"


def test_old_rows_stay_readable_and_keep_their_digest() -> None:
    old = {
        name: value for name, value in FULL.as_dict().items() if name not in ("label", "attack_label", "token_radii")
    }
    assert row_from_dict(old) == FULL
    assert "label" not in json.dumps(old)
    # the digest that a report of these rows carries, from before rows had classes
    assert rows_digest([FULL]) == "7439d4a4050b246909c3ed812878b7076fb831a48a885a7cd03d8f3a756cfb90"
    assert rows_digest([FULL]) != rows_digest([replace(FULL, label="yes")])


# ---- goals and depths ------------------------------------------------------------------------------------------------


def test_names_of_goals() -> None:
    assert NetworkGoal("decision", row=-1, label=2).key == "decision row:-1 label:2"
    assert NetworkGoal("hidden", tolerance="0.5").key == "hidden 0.5"
    assert NetworkGoal("pooled").key == "pooled 10%"
    assert [NetworkGoal(name).head for name in ("decision", "hidden", "pooled", "nearest")] == [
        "logits",
        "states",
        "mean",
        "mean",
    ]


def test_depths_by_name_and_glob() -> None:
    depths = ("input", "embeddings", "block:1", "block:2")
    assert matching_depths(depths, ["block:2", "embeddings", "block:0"]) == ("embeddings", "block:2")
    assert matching_depths(depths, ["block:*"]) == ("embeddings", "block:1", "block:2")  # block:0 is among them
    assert matching_depths(depths, ["*"]) == depths
    with pytest.raises(InputError, match=r"there is no block:3; the model has block:0 \(the embeddings\) to block:2"):
        matching_depths(depths, ["block:3"])
    with pytest.raises(UnknownNameError, match="nearest: block:1"):
        matching_depths(depths, ["blok:1"])


def test_scopes_join_depths() -> None:
    made = [whole(name, 1.0, 0.0) for name in ("block:10", "block:2", "embeddings", "block:2")]
    assert scopes(made) == ["the model's own decision; the tokens move at embeddings, block:2, block:10"]
    readout = replace(FULL, goal_scope="a readout")
    assert scopes([*made[:1], readout, FULL]) == [
        "the model's own decision; the tokens move at block:10",
        "a readout",
    ]


def test_a_network_is_read_once_for_every_threat_and_goal(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(configured(classifier, threats=["frobenius", "any-token"], goals="decision", at="block:1"))
    reads: list[str] = []
    network = type(bench.model).network

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        reads.append(options["at"])
        return network(self, *arguments, **options)

    monkeypatch.setattr(type(bench.model), "network", counted)
    for item in bench.items()[:2]:
        assert bench.row(item).status == "found"
    assert reads == ["block:1"]


def test_a_configuration_is_about_layers_or_about_the_whole(classifier: Path) -> None:
    base = {"model": str(classifier), "texts": "x.txt"}
    assert make_config(base | {"goals": "decision"}).at == ("embeddings",)
    assert make_config(base | {"goals": "decision"}).layers is None
    again = make_config(make_config(base | {"goals": "hidden", "at": "block:1"}).model_dump(mode="json"))
    assert (again.at, again.layers, again.goals[0].tolerance) == (("block:1",), None, "10%")
    for wrong, says in (
        ({"goals": ["decision", "10%"]}, "every goal at a depth"),
        ({"at": "block:1", "layers": ["a"], "goals": "decision"}, "exclude each other"),
        ({"at": [], "goals": "decision"}, "at is empty"),
        ({"goals": "decision", "texts": None, "tokens": "x.npz"}, "give texts or images"),
        ({"goals": {"goal": "nearest"}}, "--anchors"),
        ({"images": "y.npz"}, "exactly one of texts, tokens, images and dataset"),
    ):
        with pytest.raises(InputError, match=says):
            make_config(base | wrong)


# ---- the model's own word --------------------------------------------------------------------------------------------


def seen(**changes: Any) -> Confirmation:
    values: dict[str, Any] = {
        "agrees": True, "expressible": True, "usage": 1.0, "difference": 0.0, "decision": "", "label": None,
        "clean_label": None, "precision": "float64", "given_precision": "float64", "message": "",
    }  # fmt: skip
    return Confirmation(**(values | changes))


@pytest.fixture
def one(classifier: Path) -> tuple[Workbench, Any]:
    bench = Workbench(configured(classifier, at="block:1", goals="decision"))
    return bench, bench.items()[0]


def test_the_attack_is_confirmed_by_the_model_itself(
    one: tuple[Workbench, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AttackResult] = []
    real = evaluate._confirmed

    def watched(confirm: Any, result: AttackResult, message: str | None) -> Any:
        asked.append(result)
        assert confirm(result).agrees
        return real(confirm, result, message)

    monkeypatch.setattr(evaluate, "_confirmed", watched)
    bench, item = one
    assert bench.row(item).status == Status.FOUND
    assert len(asked) == 1


@pytest.mark.parametrize("how", ["contradicts", "cannot tell its own label"])
def test_a_disagreement_is_a_status_and_no_radius(
    one: tuple[Workbench, Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def confirm(*_: Any) -> Confirmation:
        if how == "contradicts":
            return seen(agrees=False, message="it keeps its label")
        raise AlreadyViolatedError("it keeps its label")

    monkeypatch.setattr("attnrobust.models.networks.reading.ReadNetwork.confirm", confirm)
    bench, item = one
    row = bench.row(item)
    assert (row.status, row.attack_radius, row.gap, row.attack_label) == (Status.DISAGREES, None, None, None)
    assert "is not one of the model itself: it keeps its label" in (row.message or "")


def test_what_the_model_cannot_be_given_is_said(one: tuple[Workbench, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = seen(agrees=False, expressible=False, usage=math.nan, message="not expressible: unequal masses")
    monkeypatch.setattr("attnrobust.models.networks.reading.ReadNetwork.confirm", lambda *_: refusal)
    bench, item = one
    row = bench.row(item)
    assert row.status == Status.FOUND
    assert (row.message or "").endswith("; not expressible: unequal masses")


def test_a_decision_on_its_boundary_is_said(one: tuple[Workbench, Any]) -> None:
    bench, item = one
    head: Any = bench.model.module.get_submodule("classifier")  # type: ignore[attr-defined]
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand_as(head.weight))
        head.bias.fill_(0.0)
    row = bench.row(item)
    assert row.status in (Status.MISCLASSIFIED, Status.ERROR)  # whether the last bits of the two logits agree
    assert "on its boundary" in (row.message or "")
    assert (row.message or "").endswith("; give another input")


def test_a_goal_that_the_model_does_not_answer_is_refused_before_any_input(classifier: Path) -> None:
    networks = Networks(Workbench(configured(classifier)).model, ["*"])
    with pytest.raises(InputError, match="has one row"):
        networks.require(NetworkGoal("decision", row=1))
    with pytest.raises(InputError, match=r"label 7 does not exist; the classes are 0 to \d+ \("):
        networks.require(NetworkGoal("decision", label=7))
    with pytest.raises(InputError, match=r"label 2 does not exist; the classes are 0 to 1$"):
        networks.require(NetworkGoal("nearest", anchors=("a", "b"), label=2))
