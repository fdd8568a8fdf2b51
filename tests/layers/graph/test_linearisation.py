"""Derivatives of whole networks against nested autodiff; parts of networks; the sweeps against each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.layers.graph import Linearisation, NetworkGraph
from attnrobust.numerics.linear_map import largest_singular_value_upper
from tests.assertions import assert_close, refused, shapes_unchecked
from tests.layers.graph.networks import D, examples, masses, nested, network, random

RTOL = 1e-11  # up to 30 nodes in a row; each node by itself is checked to 1e-12
EXAMPLES = dict(examples())
N = 5


def with_mass(name: str) -> tuple[NetworkGraph, Tensor, Tensor]:
    return EXAMPLES[name], random(N, D), masses(N)


@pytest.mark.parametrize("name", EXAMPLES)
def test_derivatives_of_networks(name: str) -> None:
    graph, x, mass = with_mass(name)
    record = graph.linearise(x, mass)
    a, b, c = random(N, D), random(N, D), random(N, D)
    at = lambda t: graph(t, mass)  # noqa: E731
    assert_close(record.clean[graph.output], graph(x, mass), rtol=1e-14)
    assert_close(record.jvp(a), nested(at, (x,), (a,)), rtol=RTOL, what="jvp")
    assert_close(record.second(a, b), nested(at, (x,), (a,), (b,)), rtol=RTOL, what="second")
    assert_close(record.third(a, b, c), nested(at, (x,), (a,), (b,), (c,)), rtol=RTOL, what="third")


@pytest.mark.parametrize("name", EXAMPLES)
def test_adjoints_of_networks(name: str) -> None:
    graph, x, mass = with_mass(name)
    record = graph.linearise(x, mass)
    a, b, v = random(N, D), random(N, D), random(N, D)
    forms = (record.jvp(v), record.second(a, v), record.third(a, b, v))
    y = torch.randn_like(forms[0])
    adjoints = (record.vjp(y), record.second_adjoint(a, y), record.third_adjoint(a, b, y))
    for form, adjoint in zip(forms, adjoints, strict=True):
        size = float(torch.linalg.vector_norm(form) * torch.linalg.vector_norm(y))
        assert float((y * form).sum()) == pytest.approx(float((adjoint * v).sum()), abs=1e-12 * size)


def test_gradient_and_hessian_of_a_readout() -> None:
    graph, x, mass = with_mass("post-gelu_tanh")
    record, at = graph.linearise(x, mass), x.clone().requires_grad_()
    c, v = random(1, 3), random(N, D)
    (gradient,) = torch.autograd.grad((c * graph(at, mass)).sum(), at)
    assert_close(record.gradient(c), gradient, rtol=1e-12)
    curvature = (c * nested(lambda t: graph(t, mass), (x,), (v,), (v,))).sum()
    assert float((record.hessian_product(c, v) * v).sum()) == pytest.approx(float(curvature), rel=1e-11)


def test_batches_and_directions_computed_once() -> None:
    graph, x, mass = network("pre", 1, "quick_gelu", gated=True), random(N, D), masses(N)
    record = graph.linearise(x, mass)
    a, b, c = random(2, 1, N, D), random(2, N, D), random(N, D)
    y = torch.randn_like(record.clean[graph.output])
    kept_a, kept_b = record.along(a), record.along(b)
    second, third = record.second(kept_a, kept_b), record.third(kept_a, kept_b, c)
    back, back_third = record.second_adjoint(kept_a, y), record.third_adjoint(kept_a, kept_b, y)
    assert_close(record.second(a, b), second, rtol=0.0)
    for i in range(2):
        assert_close(back[i, 0], record.second_adjoint(a[i, 0], y), rtol=RTOL)
        for j in range(2):
            assert_close(second[i, j], record.second(a[i, 0], b[j]), rtol=RTOL)
            assert_close(third[i, j], record.third(a[i, 0], b[j], c), rtol=RTOL)
            assert_close(back_third[i, j], record.third_adjoint(a[i, 0], b[j], y), rtol=RTOL)


def _part(graph: NetworkGraph, record: Linearisation, start: str, stop: str) -> tuple[Any, Tensor]:
    part, mass = graph.part(start, stop), record.masses[start]
    return (lambda t: part(t, mass)), record.clean[start]


def test_derivatives_between_states() -> None:
    """Between two cuts they are those of the part's own function."""
    graph, x, mass = with_mass("post-silu")
    record = graph.linearise(x, mass)
    cuts = (*graph.cuts(), graph.output)
    for start, stop in ((cuts[0], cuts[4]), (cuts[2], cuts[7]), (cuts[3], graph.output)):
        at, value = _part(graph, record, start, stop)
        a, b = torch.randn_like(value), torch.randn_like(value)
        where = {"start": start, "stop": stop}
        assert_close(record.jvp(a, **where), nested(at, (value,), (a,)), rtol=RTOL)
        assert_close(record.second(a, b, **where), nested(at, (value,), (a,), (b,)), rtol=RTOL)
        assert_close(record.third(a, b, a, **where), nested(at, (value,), (a,), (b,), (a,)), rtol=RTOL)
        y = torch.randn_like(record.clean[stop])
        form, adjoint = record.second(a, b, **where), record.second_adjoint(a, y, **where)
        assert float((y * form).sum()) == pytest.approx(float((adjoint * b).sum()), rel=1e-10)


def test_a_change_of_an_inner_branch() -> None:
    """A state that is no cut: the change is added there and everything after it is recomputed."""
    graph, x, _ = with_mass("post-gelu")
    record, name = graph.linearise(x), "block0.attention"
    move = torch.randn_like(record.clean[name])
    start = graph.tail("block0.attention.sum")
    assert_close(
        record.jvp(move, start=name), nested(start, (record.clean["block0.attention.sum"],), (move,)), rtol=RTOL
    )


def test_push_and_pull_are_transposed_and_add_up() -> None:
    graph, x, mass = with_mass("pre-gelu_tanh")
    record, names = graph.linearise(x, mass), graph.names
    sources = {name: torch.randn_like(record.clean[name]) for name in (names[0], names[3], names[6])}
    targets = (names[2], names[6], names[-1])
    pushed = record.push(sources, targets)
    for target in targets:
        alone = [record.jvp(value, start=name, stop=target) for name, value in sources.items()]
        assert_close(pushed[target], sum(alone[1:], start=alone[0]), rtol=1e-12)
    ys = {name: torch.randn_like(record.clean[name]) for name in targets}
    pulled = record.pull(ys, sources)
    left = sum(float((ys[name] * pushed[name]).sum()) for name in targets)
    right = sum(float((sources[name] * pulled[name]).sum()) for name in sources)
    assert left == pytest.approx(right, rel=1e-11)


def test_states_that_do_not_depend_on_the_start() -> None:
    graph, x, mass = with_mass("post-gelu")
    record = graph.linearise(x, mass)
    late, early = graph.names[6], graph.names[2]
    y = random(3, *record.clean[early].shape)
    assert_close(record.vjp(y, start=late, stop=early), torch.zeros(3, *record.clean[late].shape).double(), rtol=0.0)
    a = random(3, *record.clean[late].shape)
    assert_close(record.jvp(a, start=late, stop=early), torch.zeros_like(y), rtol=0.0)
    assert_close(record.second(a, a, start=late, stop=early), torch.zeros_like(y), rtol=0.0)


def test_linear_map_has_the_norm_of_the_jacobian() -> None:
    graph, x, mass = with_mass("pre-silu")
    linear = graph.linearise(x, mass).linear_map(stop="block0.mlp.sum")
    part = graph.part("input", "block0.mlp.sum")
    jacobian = torch.autograd.functional.jacobian(lambda t: part(t, mass), x).reshape(linear.out_size, linear.in_size)
    assert_close(linear.dense(), jacobian, rtol=1e-12)
    bound = largest_singular_value_upper(linear).value
    assert bound == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-8)


def test_no_autograd_graph() -> None:
    graph, x, mass = with_mass("post-tanh")
    record = graph.linearise(x.requires_grad_(), mass)
    a = random(N, D).requires_grad_()
    y = torch.randn_like(record.clean[graph.output])
    results = (record.jvp(a), record.vjp(y), record.second(a, a), record.second_adjoint(a, y), record.third(a, a, a))
    assert not any(result.requires_grad for result in (*results, record.third_adjoint(a, a, y), *record.clean.values()))


@pytest.mark.parametrize("order", ["post", "pre"])
def test_relu_networks_have_a_first_order_only(order: str) -> None:
    graph, x = network(order, 2, "relu"), random(N, D)
    record, a = graph.linearise(x), random(N, D)
    assert_close(record.jvp(a), nested(graph, (x,), (a,)), rtol=RTOL)
    with refused(UnsupportedModelError, "relu"):
        record.second(a, a)
    before = graph.part("input", "block0.mlp.in")
    found = record.second(a, a, stop="block0.mlp.in")
    assert_close(found, nested(before, (x,), (a,), (a,)), rtol=RTOL)


def test_refuses() -> None:
    graph, x, mass = with_mass("post-gelu")
    record = graph.linearise(x, mass)
    with refused(InputError, r"must end in \(5, 4\)"):
        record.jvp(random(N, D + 1))
    with refused(UnknownNameError, "block0.norm_3", "block0.norm_1"):
        record.jvp(random(N, D), start="block0.norm_3")
    with shapes_unchecked(), refused(InputError, "one input"):
        graph.linearise(random(2, N, D))
    with refused(InputError, "width 3"):
        graph.linearise(random(N, 3))
    early = record.along(random(N, D), stop="block0.norm_1")
    with refused(InputError, "up to block0.norm_1", "compute it"):
        record.second(early, early)
    with refused(InputError, "not finite"):
        graph.linearise(1e200 * x)
