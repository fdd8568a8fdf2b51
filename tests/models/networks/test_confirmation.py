"""Points that attacks found, in the user's own model."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Margin
from attnrobust.models.networks.reading import ReadNetwork
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.results import AttackResult
from attnrobust.status import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import PerturbedTokens
from tests.assertions import assert_at_most, assert_close, refused
from tests.models.networks.models import HEADS, inputs_of, torch_inputs, torch_model

QUICK = AttackBudget(restarts=2, steps=10, rounds=1)


@dataclass(frozen=True)
class Point:
    """What is asked of a result."""

    perturbed: Tensor | None
    usage: float = 1.0
    atoms: PerturbedTokens | None = None


def read(name: str, at: str = "block:1", **options: Any) -> ReadNetwork:
    return read_network(HEADS[name]().float(), inputs_of(name), at=at, **options)


def flipped(network: ReadNetwork) -> AttackResult:
    graph, goal = network.decision()
    return attack(Problem(graph, network.input.measure, FrobeniusBall(), goal), budget=QUICK)


@pytest.mark.parametrize("name", ["bert sequence", "gpt2 next word", "vit image", "distilbert sequence"])
@pytest.mark.parametrize("at", ["embeddings", "block:1"])
def test_a_flip_is_a_flip_of_the_model(name: str, at: str) -> None:
    network = read(name, "block:1" if name == "bert sequence" else at)
    result = flipped(network)
    said = network.confirm(result)
    assert said.agrees
    assert said.status is Status.FOUND
    assert said.message == ""
    assert said.label != said.clean_label
    assert (said.precision, said.given_precision) == ("float64", "float32")
    assert 1.0 <= said.usage < 1.0 + 1e-6
    assert_at_most(said.difference, 1e-13)
    assert network.confirm(result, network.decision()[1]).usage == said.usage
    assert str(said.label) in said.decision


def test_short_of_the_flip_the_model_keeps_its_class() -> None:
    network = read("distilbert sequence")
    result = flipped(network)
    clean = network.input.measure.points
    assert result.perturbed is not None
    short = clean + (1.0 - 1e-6) * (result.perturbed - clean)
    said = network.confirm(Point(short, usage=0.999))
    assert said.agrees
    assert said.label == said.clean_label
    claimed = network.confirm(Point(short, usage=1.0))
    assert not claimed.agrees
    assert claimed.status is Status.DISAGREES
    assert "DistilBertForSequenceClassification itself uses 0.99" in claimed.message


def test_a_model_that_does_something_else_away_from_its_input_disagrees() -> None:
    """A block that puts out what it did at the clean input, wherever its tokens are."""
    network = read("distilbert sequence")
    assert network.own is not None
    kept: list[Any] = []

    def first_output(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        kept.append(output)
        return kept[0]

    network.own.module.get_submodule("distilbert.transformer.layer.1").register_forward_hook(first_output)
    said = network.confirm(flipped(network))
    assert said.status is Status.DISAGREES
    assert said.label == said.clean_label
    assert said.usage == 0.0
    assert said.difference > 1e-3
    assert f"differ by {said.difference:.3g} of the terms" in said.message


@pytest.mark.parametrize("name", ["post-norm layer", "batch second", "sequential"])
def test_displacements_of_torch_models(name: str) -> None:
    network = read_network(torch_model(name), torch_inputs(name))
    goal = Displacement(0.01, relative=True)
    result = attack(Problem(network.graph, network.input.measure, FrobeniusBall(), goal), budget=QUICK)
    said = network.confirm(result, goal)
    assert said.agrees
    assert said.label is None
    assert_close(torch.tensor(said.usage), torch.tensor(result.usage), rtol=1e-6)


def test_anchors_are_read_from_the_mean() -> None:
    network = read("distilbert sequence", head="mean")
    goal = Margin(torch.randn(3, network.graph.out_width, dtype=torch.float64), pool=0)
    result = attack(Problem(network.graph, network.input.measure, FrobeniusBall(), goal), budget=QUICK)
    said = network.confirm(result, goal)
    assert said.agrees
    assert said.label != said.clean_label


def copied(network: ReadNetwork, *, split: bool = False) -> Point:
    """The clean input with one more atom at token 1: a copy of equal mass, or half of the token."""
    clean = network.input.measure
    parent = torch.tensor([*range(clean.n), 1])
    mass = torch.ones(clean.n + 1, dtype=torch.float64)
    if split:
        mass[1] = mass[-1] = 0.5
    return Point(
        clean.points[parent], usage=0.5, atoms=PerturbedTokens(clean.points[parent], mass / mass.sum(), parent)
    )


def test_one_rival_alone() -> None:
    network = read("distilbert sequence")
    any_class = flipped(network)
    label = network.confirm(any_class).clean_label
    radii = {}
    for target in {0, 1, 2} - {label}:
        graph, goal = network.decision(target=target)
        result = attack(Problem(graph, network.input.measure, FrobeniusBall(), goal), budget=QUICK)
        said = network.confirm(result, goal)
        assert said.agrees
        assert said.label != label or said.usage < 1.0 + 1e-6
        radii[target] = result.radius
    assert_at_most(any_class.radius, min(radii.values()) * 1.01)
    assert_at_most(min(radii.values()), any_class.radius * 1.01)
    for wrong in (label, 3, -1):
        with refused(InputError, f"target {wrong}"):
            network.decision(target=wrong)


def test_copies_are_tokens_to_the_model() -> None:
    said = read("distilbert sequence").confirm(copied(read("distilbert sequence")))
    assert said.expressible
    assert said.agrees
    assert_at_most(said.difference, 1e-13)


@pytest.mark.parametrize(
    ("name", "split", "why"), [("distilbert sequence", True, "unequal masses"), ("gpt2 next word", False, "mask")]
)
def test_what_the_model_cannot_be_given(name: str, split: bool, why: str) -> None:
    network = read(name)
    said = network.confirm(copied(network, split=split))
    assert not said.expressible
    assert why in said.message
    assert math.isnan(said.usage)
    assert said.status is Status.FOUND  # the claim about the graph stands


def test_nothing_to_confirm() -> None:
    network = read("vit image")
    with refused(InputError, "found no point"):
        network.confirm(Point(None))
    with refused(InputError, "no model object|not read from a model object"):
        ReadNetwork(network.graph, network.input, network.info).confirm(Point(network.input.measure.points))


def test_of_a_vocabulary_the_largest_scores_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    network = read("gpt2 next word")
    result = flipped(network)
    graph, goal = network.decision()
    whole = network.confirm(result)
    label = Problem(graph, network.input.measure, FrobeniusBall(), goal).resolved.label
    assert isinstance(label, int)
    assert result.perturbed is not None
    outside = Point(network.input.measure.points + 2.0 * (result.perturbed - network.input.measure.points))
    inside = Point(network.input.measure.points + 0.9 * (result.perturbed - network.input.measure.points), usage=0.9)
    monkeypatch.setattr("attnrobust.models.networks.confirmation.MOST_CLASSES", 4)
    for asked in (None, goal, replace(goal, label=label)):
        said = network.confirm(result, asked)
        assert (said.agrees, said.label, said.clean_label) == (True, whole.label, whole.clean_label)
        assert_close(torch.tensor(said.usage), torch.tensor(whole.usage), rtol=1e-12)
        assert network.confirm(outside, asked).agrees
        assert network.confirm(inside, asked).agrees


def test_a_vocabulary_is_confirmed_without_a_matrix_of_its_square() -> None:
    words = 20000
    network = read_network(HEADS["gpt2 next word"](vocab_size=words), inputs_of("gpt2"), at="block:1")
    result = flipped(network)
    _, goal = network.decision()
    assert goal.weight.shape[0] == words
    assert network.confirm(result, goal).agrees
