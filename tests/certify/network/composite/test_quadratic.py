"""Quadratic terms of remainders from their nodes to a target: the norms against their definition and against ascent."""

import torch
from torch import Tensor

from attnrobust.certify.network.composite.margin import ClassDrop
from attnrobust.certify.network.composite.preparation import Preparation
from attnrobust.certify.network.composite.quadratic import QuadraticForms, token_basis, token_wise
from attnrobust.certify.network.composite.targets import Port, Readout, Target
from tests.assertions import assert_close
from tests.certify.network.composite.ascent import supremum
from tests.certify.network.composite.cases import Case
from tests.layers.graph.networks import D, masses, network, random


def prepared() -> Preparation:
    return Case(network("post", 1, "gelu"), random(2, D), masses(2)).prepared()


def form(found: Preparation, target: Target, port: Port) -> Tensor:
    """``S_l Y f_m''[a, b]`` of all pairs of unit vectors of the port, (N, N, size)."""
    unit, node = torch.eye(port.size, dtype=torch.float64), found.record.nodes[port.name]
    one, two = (node.features(port.edges(part)) for part in (unit[:, None], unit[None]))
    return target.flat(found.record.push({port.name: node.bilinear(one, two)}, target.states))


def sources(found: Preparation, target: Target) -> list[Port]:
    return [port for port in found.upstream(target) if found.upstream(port)]


def test_the_product_is_the_unfolding_port_by_port() -> None:
    found = prepared()
    ports = sources(found, found.output)
    assert len(ports) > 2
    stacked = torch.eye(sum(port.size for port in ports), dtype=torch.float64)
    forms = QuadraticForms(found.record, found.output, ports, stacked)
    squares = [torch.einsum("avk,awk->vw", part, part) for part in (form(found, found.output, port) for port in ports)]
    assert_close(forms.product(stacked), torch.block_diag(*squares), rtol=1e-11)
    weights = [0.5 + index for index in range(len(ports))]
    weighed = torch.block_diag(*(part / weight**2 for part, weight in zip(squares, weights, strict=True)))
    assert_close(forms.weighed(weights).product(stacked), weighed, rtol=1e-11)


def test_tokens_that_stay_apart_share_a_basis() -> None:
    """Between a normalisation and an activation they do, behind an attention or a pool they do not."""
    found = Case(network("post", 2, "gelu", gated=True), random(2, D)).prepared()
    ports = {port.name: port for port in found.metrics.ports}
    block = {name.rsplit(".", 1)[-1]: port for name, port in ports.items() if name.startswith("block0")}
    pairs = [(port, target) for port in block.values() for target in ports.values() if target.name != port.name]
    apart = [(port, target) for port, target in pairs if token_wise(found.record, port, target)]
    assert 0 < len(apart) < len(pairs)
    for port, target in apart:
        if port not in found.upstream(target):
            continue
        tensor = form(found, target, port)
        forms = QuadraticForms(found.record, target, [port], token_basis(port, torch.device("cpu")))
        unit = torch.eye(port.size, dtype=torch.float64)
        assert_close(forms.product(unit), torch.einsum("avk,awk->vw", tensor, tensor), rtol=1e-11)
    pooled = Readout(found.output.state, found.output.shape, torch.tensor([0.5, 0.5]).double())
    assert not token_wise(found.record, found.metrics.ports[-1], pooled)


def test_quadratic_terms_stay_below_their_norms() -> None:
    """Of every node at every target behind it; ascent over remainders of metric norm 1 comes near somewhere."""
    found, ratios = prepared(), []
    targets: dict[str, Target] = {port.name: port for port in found.metrics.ports if port.name in found.ports}
    norms = {**found.ports, "output": found.readout}
    for name, target in {**targets, "output": found.output}.items():
        for port in sources(found, target):
            tensor, kappa = form(found, target, port), norms[name].quadratics[port.name]
            ratios.append(_largest(tensor) / kappa)
    assert max(ratios) <= 1.0 + 1e-9
    assert max(ratios) > 0.8


def test_read_out_quadratic_terms_stay_below_and_near_their_norms() -> None:
    """A functional's form is symmetric, so that its norm is attained."""
    found = prepared()
    readout = Readout(found.output.state, found.output.shape, torch.tensor([0.5, 0.5]).double(), random(D))
    drop = ClassDrop(found, readout)
    ports = sources(found, readout)
    ratios = [_largest(form(found, readout, port)) / drop.norms.quadratics[port.name] for port in ports]
    assert max(ratios) <= 1.0 + 1e-9
    assert max(ratios) > 0.95


def _largest(tensor: Tensor) -> float:
    """``sup |B[v, v]|`` over unit vectors, by ascent."""
    size = tensor.shape[0]
    square = lambda v: torch.linalg.vector_norm(torch.einsum("ba,ack,bc->bk", v, tensor, v), dim=-1)  # noqa: E731
    return supremum(square, (1.0,), (size,), steps=40)
