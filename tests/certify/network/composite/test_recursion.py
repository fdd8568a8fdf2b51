"""The bound of every port's remainder and of the output's, against ascent on whole random networks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.composite.preparation import Preparation
from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Port, Target, forwards
from attnrobust.layers.graph.linearisation import Linearisation
from tests.certify.network.composite.ascent import supremum
from tests.certify.network.composite.cases import Case
from tests.layers.graph.networks import D, masses, network, random


def matrix(record: Linearisation, moves: Moves, target: Target) -> Tensor:
    """The first order of a target, (N, size)."""
    unit = torch.eye(moves.size, dtype=torch.float64)
    return target.flat(record.push({record.wiring.source: moves.tokens(unit)}, target.states))


def largest_ratio(case: Case, radii: tuple[float, ...]) -> float:
    """Assert every bound; the largest ratio of an attack and its bound."""
    prepared, closest = case.prepared(), 0.0
    targets: dict[str, Target] = {port.name: port for port in prepared.metrics.ports if port.name in prepared.ports}
    for radius in radii:
        recursion = prepared.recursion(radius)
        bounds = {name: parts.total for name, parts in recursion.parts.items()}
        bounds["output"] = prepared.first * radius + recursion.at(prepared.readout).total
        for name, target in {**targets, "output": prepared.output}.items():
            found = attacked(case, prepared, target, radius, remainder=name != "output")
            if found > bounds[name] * (1.0 + 1e-9) + 1e-12:
                raise AssertionError(f"{name} at {radius}: {found!r} exceeds {bounds[name]!r}")
            closest = max(closest, found / bounds[name] if found > 1e-9 else 0.0)
    return closest


def attacked(case: Case, prepared: Preparation, target: Target, radius: float, *, remainder: bool) -> float:
    record, moves = prepared.record, prepared.moves
    linear, clean = matrix(record, moves, target), target.flat(record.clean)

    def value(d: Tensor) -> Tensor:
        states = case.graph.states(case.x + moves.tokens(d), case.mass, keep=target.states)
        change = target.flat(states) - clean
        return torch.linalg.vector_norm(change - d @ linear if remainder else change, dim=-1)

    return supremum(value, (radius,), (moves.size,))


CASES: dict[str, Any] = {
    "post gelu": lambda: Case(network("post", 1, "gelu"), random(2, D)),
    "pre silu gated rms, two blocks, masses": lambda: Case(
        network("pre", 2, "silu", gated=True, rms=True), random(2, D), masses(2)
    ),
    "post tanh causal, class token, two blocks": lambda: Case(
        network("post", 2, "tanh", head="cls", causal=True), random(2, D)
    ),
    "pre gelu_tanh, mean, one token moves": lambda: Case(
        network("pre", 1, "gelu_tanh", head="mean"), random(3, D), None, torch.tensor([False, True, False])
    ),
    "post quick_gelu gated, one token": lambda: Case(network("post", 1, "quick_gelu", gated=True), random(1, D)),
    "pre sigmoid, equal tokens": lambda: Case(network("pre", 1, "sigmoid"), random(1, D).expand(2, D).contiguous()),
    "post gelu, large tokens": lambda: Case(network("post", 1, "gelu"), random(2, D, scale=30.0)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(2)
def test_bounds_of_every_port(name: str) -> None:
    assert largest_ratio(CASES[name](), (1e-2,)) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_bounds_of_every_port_on_many_networks(seed: int) -> None:
    torch.manual_seed(seed)
    order, activation = ("post", "pre")[seed % 2], ("gelu", "silu", "tanh", "gelu_tanh")[seed % 4]
    graph = network(order, 1 + seed % 3, activation, gated=seed % 5 == 0, rms=seed % 3 == 0, causal=seed % 2 == 0)
    case = Case(graph, random(1 + seed % 4, D, scale=(0.3, 1.0, 10.0)[seed % 3]))
    assert largest_ratio(case, (1e-3, 1e-2, 0.1, 1.0)) > 0.5


def test_a_root_is_narrow() -> None:
    """The port of an activation lives at what its wide affine map reads."""
    case = CASES["post gelu"]()
    prepared = case.prepared()
    port = next(port for port in prepared.metrics.ports if port.name.endswith("mlp.act"))
    assert isinstance(port, Port)
    assert port.roots == ("block0.norm_1",)
    flat = random(port.size)
    root = flat.reshape(2, D) / port.scales[0]
    assert torch.allclose(port.edges(flat)[0], forwards(root, port.maps[0]))
