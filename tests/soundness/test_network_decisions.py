"""Decisions of whole models: the model's own label, flips that the user's own model confirms, no claim of a layer's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import METHODS, ON_REQUEST, certify
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.models.model import ModuleModel
from attnrobust.models.networks.reading import ReadNetwork
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_close, refused
from tests.models.networks.models import HEADS, inputs_of

BUDGET = AttackBudget(restarts=2, steps=20, rounds=1)
BLOCKS = {"bert sequence": "bert.encoder.layer", "gpt2 next word": "transformer.h", "vit image": "vit.layers"}

QUICK = ("network-lipschitz", "network-product", "network-chain")
"""Those that take seconds here; the slow tests run all."""


def with_replaced_state(model: nn.Module, path: str, tokens: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (rows, c) of the user's own model after replacing what enters one block."""
    seen: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (tokens[None], *args[1:])

    handle = model.get_submodule(path).register_forward_pre_hook(replace)
    with torch.no_grad():
        output: Any = model(**inputs)
    handle.remove()
    assert len(seen) == 1
    logits: Tensor = output.logits
    return logits[0] if logits.ndim == 3 else logits


def flip(read: ReadNetwork) -> tuple[Problem, AttackResult]:
    network, goal = read.decision()
    problem = Problem(network, read.input.measure, FrobeniusBall(), goal)
    return problem, attack(problem, budget=BUDGET)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_users_own_model_confirms_the_flip(name: str, block: int) -> None:
    model, inputs = HEADS[name](), inputs_of(name)
    with torch.no_grad():
        clean: Any = model(**inputs)
    own = int(clean.logits.reshape(-1, clean.logits.shape[-1])[-1].argmax())
    problem, result = flip(read_network(model, inputs, at=f"block:{block}"))
    assert problem.resolved.label == own
    assert result.status is Status.FOUND
    assert result.perturbed is not None
    path = f"{BLOCKS[name]}.{block}"
    moved = problem.clean.points + 1.0001 * (result.perturbed - problem.clean.points)  # off the boundary itself
    inner = problem.clean.points + 0.99 * (result.perturbed - problem.clean.points)
    logits = with_replaced_state(model, path, moved, inputs)[-1]
    assert int(logits.argmax()) != own
    assert int(with_replaced_state(model, path, inner, inputs)[-1].argmax()) == own
    assert_close(problem.goal.logits(problem.network(moved)[0]), logits, rtol=1e-10)  # type: ignore[attr-defined]


def test_the_split_of_the_decision_is_the_margin_of_the_identity() -> None:
    read = read_network(HEADS["bert sequence"](), inputs_of("bert"))
    network, goal = read.decision()
    split = Problem(network, read.input.measure, FrobeniusBall(), goal)
    whole = Problem(
        read.graph, read.input.measure, FrobeniusBall(), Margin(torch.eye(3, dtype=torch.float64), pool="mean")
    )
    delta = torch.randn(5, *read.input.measure.points.shape, dtype=torch.float64)
    assert split.resolved.label == whole.resolved.label
    assert_close(split.resolved.budgets, whole.resolved.budgets, rtol=1e-12)
    # of the budgets themselves: what each allows for its own rounding differs
    points = read.input.measure.points + delta
    shares = [(p.resolved.changes(p.network(points)) / p.resolved.budgets).amax(dim=-1) for p in (split, whole)]
    assert_close(shares[0], shares[1], rtol=1e-11)
    with refused(InputError, "no single row of logits"):
        read_network(HEADS["bert sequence"](), inputs_of("bert"), head="states").decision()
    with refused(InputError, "no single row of logits"):
        read_network(HEADS["bert tokens"](), inputs_of("bert")).decision()


def test_certificates_of_layers_refuse_a_network_by_name() -> None:
    read = read_network(HEADS["bert sequence"](), inputs_of("bert"))
    network, goal = read.decision()
    layers = [method for method in (*METHODS, *ON_REQUEST) if NetworkGraph not in method.layers]
    for asked in (goal, Displacement(0.1)):
        problem = Problem(network, read.input.measure, FrobeniusBall(), asked)
        report = certify(problem, methods=[method.name for method in layers])
        assert report.certificates == ()
        assert all("NetworkGraph" in skipped.reason and not skipped.declared for skipped in report.skipped)
    assert len(layers) < len(METHODS)


@pytest.mark.parametrize("name", ["bert sequence", "gpt2 next word", "vit image"])
def test_no_flip_is_inside_a_radius_of_the_network(name: str) -> None:
    problem, result = flip(read_network(HEADS[name](), inputs_of(name), at="block:1"))
    assert result.status is Status.FOUND
    report = certify(problem, methods=QUICK)
    assert set(QUICK) == {certificate.method for certificate in report.certificates}
    for certificate in report.certificates:
        assert 1e-4 * result.radius < certificate.radius < result.radius


def test_a_heads_margin_on_one_layer_is_no_claim_about_the_model() -> None:
    """The classifier as readout of one attention layer "certifies" the model's label on a ball in which it flips."""
    model, inputs = HEADS["bert sequence"](), {"input_ids": torch.tensor([[5, 9, 12, 7, 22]])}
    wrapped = ModuleModel(model)
    head: Any = wrapped.module.get_submodule("classifier")
    layer = Problem(
        wrapped.layer("1.attention"),
        wrapped.capture_inputs("1.attention", inputs).measure,
        FrobeniusBall(),
        Margin(head.weight, head.bias, pool=0),
    )
    claimed = certify(layer, methods="margin-majorant").certificates[0].radius
    problem, result = flip(wrapped.network(inputs, at="block:1"))
    assert layer.resolved.label == problem.resolved.label
    assert_close(layer.clean.points, problem.clean.points, rtol=1e-14)
    assert result.perturbed is not None
    moved = problem.clean.points + 1.0001 * (result.perturbed - problem.clean.points)
    assert 0.0 < float(torch.linalg.vector_norm(moved - problem.clean.points)) < 0.9 * claimed
    logits = with_replaced_state(model, "bert.encoder.layer.1", moved, inputs)
    assert int(logits.argmax()) != problem.resolved.label  # the layer's claim is true of the layer only
    assert all(certificate.radius < result.radius for certificate in certify(problem, methods=QUICK).certificates)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_no_decision_of_many_small_classifiers_flips_inside_a_radius(seed: int) -> None:
    """Of such classifiers the head as readout of one layer is often "certified" beyond the flip."""
    problem, result = flip(read_network(*small_classifier(seed), at="block:1"))
    found = certify(problem).certificates
    assert found
    for certificate in found:
        assert 0.0 < certificate.radius < result.radius


def small_classifier(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A BERT classifier with weights of one of many sizes, and five words."""
    torch.manual_seed(seed)
    model, inputs = HEADS["bert sequence"](), {"input_ids": torch.randint(1, 30, (1, 5))}
    for parameter in model.parameters():
        parameter.data.mul_(0.5 + torch.rand(()).item())
    return model, inputs
