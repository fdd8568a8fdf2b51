"""Modules that run several times in one forward pass: ALBERT, and torch's containers with one layer at two places."""

from typing import Any

import pytest
import torch
from torch import nn

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.errors import UnsupportedModelError
from attnrobust.models.listing import list_layers
from attnrobust.models.model import ModuleModel
from attnrobust.models.networks.plan import Wanted
from attnrobust.models.networks.reading import capture_states, plan_of
from attnrobust.models.networks.states import watch
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_at_most, assert_close, assert_same_bits, refused
from tests.hf_models import randomised
from tests.models.networks.models import HEADS, encoder_layer, inputs_of

LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
GROUPS: tuple[dict[str, int], ...] = (
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 4, "num_hidden_groups": 2},
    {"num_hidden_layers": 2, "inner_group_num": 2},
)


def albert(**changes: Any) -> nn.Module:
    return HEADS["albert sequence"](**changes)


@pytest.mark.parametrize("changes", GROUPS, ids=str)
def test_the_states_of_every_pass_in_their_order(changes: dict[str, int]) -> None:
    model, inputs = albert(**changes), inputs_of("bert")
    passes: list[torch.Tensor] = []
    for path, module in model.named_modules():
        if path.split(".")[-2:-1] == ["albert_layers"]:
            module.register_forward_hook(lambda _, args, __: passes.append(args[0][0].detach().clone()))
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = tuple(passes)
    captured = capture_states(model, inputs)
    assert len(captured) == len(expected) + 1
    for depth, (name, state) in enumerate(zip(captured, expected, strict=False)):
        read = read_network(model, inputs, at=f"block:{depth}")
        assert read.info.at == name
        assert read.info.blocks == len(expected)
        assert_same_bits(read.input.measure.points, state)
        assert_close(read.graph(state), logits, rtol=1e-12)


def test_the_weights_are_kept_once() -> None:
    first, second, third = plan_of(albert(num_hidden_layers=3), Wanted()).blocks
    assert first.attention is second.attention is third.attention
    assert first.mlp is third.mlp


@pytest.mark.parametrize("at", ["embeddings", "block:1"])
def test_attacked_confirmed_and_certified(at: str) -> None:
    network = read_network(albert(), inputs_of("bert"), at=at)
    graph, goal = network.decision()
    problem = Problem(graph, network.input.measure, FrobeniusBall(), goal)
    found = attack(problem, budget=AttackBudget(restarts=2, steps=20, rounds=1))
    said = network.confirm(found)
    assert said.agrees
    assert said.label != said.clean_label
    assert_at_most(said.difference, 1e-13)
    best = certify(problem, methods=["network-chain"]).best
    assert best is not None
    assert 0.0 < best.radius < found.radius


def test_one_module_at_two_places_of_torch_containers() -> None:
    linear, layer = nn.Linear(8, 8), encoder_layer()
    model = randomised(nn.Sequential(linear, layer, nn.Tanh(), linear, layer))
    inputs = {"input": torch.randn(1, 3, 8, dtype=torch.float64)}
    read = read_network(model, inputs, at="block:1")
    assert read.info.depths == ("input", "embeddings", "block:1")
    assert_close(read.graph(read.input.measure.points), model(**inputs)[0].detach(), rtol=1e-12)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    encoder.layers = nn.ModuleList([layer, layer])
    read = read_network(encoder.eval(), {"src": inputs["input"]})
    assert read.info.blocks == 2
    assert_close(read.graph(read.input.measure.points), encoder(inputs["input"])[0].detach(), rtol=1e-12)


def test_a_module_that_runs_more_often_than_the_model_says() -> None:
    """A hook of the user's own calls a shared block once more."""
    model, inside = albert(), list[int]()

    def call_again(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not inside:
            inside.append(1)
            module(*args)
            inside.clear()

    plan = plan_of(model, Wanted())
    for run in (model.get_submodule(LAYER), model.get_submodule(f"{LAYER}.attention")):
        hook = run.register_forward_hook(call_again)
        with refused(UnsupportedModelError, "called 4 times", "2 calls"):
            states = watch(model, plan, inputs_of("bert"))
            (probe, call), _ = states.attention
            probe.call(call.index, call.count)
        hook.remove()


def test_the_attention_layer_is_listed_once() -> None:
    (layer,) = list_layers(albert())
    assert layer.supported
    assert layer.kind == "AlbertAttention, with W_O, without residual and LayerNorm"
    with refused(UnsupportedModelError, "AlbertAttention is called 2 times", "--at block:K"):
        ModuleModel(albert()).capture_inputs(layer.name, inputs_of("bert"))
