"""Wiring, parts, masses and identity of network graphs, and their use as the network of a problem."""

import math
from dataclasses import replace

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.graph import (
    Affine,
    Attend,
    ConcatTokens,
    GraphBuilder,
    NetworkGraph,
    PoolMean,
    Product,
    Scale,
    Step,
    Sum,
)
from attnrobust.layers.masks import padding_mask
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.normalisation import LayerNorm
from attnrobust.layers.token_map import TokenMap
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_close, refused
from tests.layers.graph.networks import D, attention, block_parts, examples, masses, network, random

N = 5


@pytest.mark.parametrize("order", ["post", "pre"])
def test_blocks_agree_with_the_nested_layers(order: str) -> None:
    layer, mlp = attention(), Mlp(w_1=random(D, 6), w_2=random(6, D), b_1=random(6), b_2=random(D))
    norms = [LayerNorm(weight=random(D), bias=random(D)) for _ in range(2)]
    builder = GraphBuilder(D)
    add = builder.post_norm_block if order == "post" else builder.pre_norm_block
    last = add("block", attention=layer, norm_1=norms[0], mlp=mlp, norm_2=norms[1])
    graph = builder.build()
    post = (Residual(layer), norms[0], Residual(mlp), norms[1])
    pre = (Residual(Network((norms[0], layer))), Residual(Network((norms[1], mlp))))
    expected, x, mass = Network(post if order == "post" else pre), random(3, N, D), masses(N)
    assert_close(graph(x), expected(x), rtol=1e-14)
    assert_close(graph(x, mass), expected(x, mass), rtol=1e-14)
    assert graph.output == last
    assert (graph.width, graph.out_width) == (D, D)
    assert isinstance(graph, TokenMap)


def test_gated_mlp() -> None:
    parts = block_parts("silu", gated=True)
    mlp, builder, x = parts["mlp"], GraphBuilder(D), random(N, D)
    builder.feed_forward("mlp", mlp)
    inner = torch.nn.functional.silu(x @ mlp.w_1 + mlp.b_1) * (x @ mlp.w_gate + mlp.b_gate)
    assert_close(builder.build()(x), inner @ mlp.w_2 + mlp.b_2, rtol=1e-14)


@pytest.mark.parametrize(("name", "graph"), list(examples()))
def test_tails_give_the_same_output(name: str, graph: NetworkGraph) -> None:
    x, mass = random(N, D), masses(N)
    states, carried = graph.states(x, mass), graph.masses(mass, N)
    assert set(graph.depths()) <= set(graph.cuts())
    for cut in graph.cuts():
        tail = graph.tail(cut)
        assert_close(tail(states[cut], carried[cut]), graph(x, mass), rtol=1e-14, what=cut)
        assert tail.source == cut
        assert tail.depths()[0] == cut
        assert tail.width == graph.widths[cut]
    for step in graph.steps:
        if step.name not in graph.cuts():
            with refused(InputError, step.name):
                graph.tail(step.name)


def test_depths() -> None:
    graph = network("post", 3, "gelu", head="cls")
    assert graph.depths() == ("input", "positions", "block0.norm_2", "block1.norm_2")
    assert graph.tail("block0.norm_2").depths() == ("block0.norm_2", "block1.norm_2")
    assert "block1.mlp.in" not in graph.cuts()
    assert "block1.attention.sum" in graph.cuts()
    assert graph.part("block0.norm_2", "block1.norm_1").output == "block1.norm_1"


def test_describe() -> None:
    table = network("post", 1, "gelu", head="cls").describe()
    assert "positions *" in table
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert lines["block0.mlp.in"].split()[1:] == ["Affine", "block0.norm_1", "4", "->", "6"]
    assert "Attention(2 heads)" in lines["block0.attention"]
    assert "Activate(gelu)" in lines["block0.mlp.act"]


def test_one_pooled_row_and_its_mass() -> None:
    graph, x, mass = network("pre", 2, "gelu", head="mean"), random(3, N, D), masses(N)
    assert graph(x, mass).shape == (3, 1, 3)
    assert_close(graph.output_mass(mass, N), torch.ones(1).double(), rtol=0.0)
    tokens = network("pre", 1, "gelu")
    assert_close(tokens.output_mass(mass, N), mass, rtol=1e-15)
    assert_close(tokens.output_mass(None, 4), torch.full((4,), 0.25).double(), rtol=0.0)
    assert tokens.rows(N)[tokens.output] == N


@pytest.mark.parametrize("head", ["cls", "mean"])
def test_a_token_split_into_copies_changes_nothing(head: str) -> None:
    graph, x, mass = network("post", 2, "silu", head=head), random(N, D), masses(N)
    if head == "cls":  # positions tell copies apart
        graph = NetworkGraph(D, tuple(s for s in _without_positions(graph)), depth_names=("input",))
    copies, shares = torch.cat([x, x[-1:]]), torch.cat([mass[:-1], 0.3 * mass[-1:], 0.7 * mass[-1:]])
    assert_close(graph(copies, shares), graph(x, mass), rtol=1e-12)


def _without_positions(graph: NetworkGraph) -> list[Step]:
    steps = [step for step in graph.steps if step.name != "positions"]
    renamed = {"positions": "class"}
    return [Step(s.name, s.node, tuple(renamed.get(name, name) for name in s.reads)) for s in steps]


def test_padding_has_no_mass_or_is_absent() -> None:
    graph, x = network("post", 2, "gelu", head="mean"), random(N, D)
    mass = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert_close(graph(x, mass), graph(x[:3]), rtol=1e-13)
    record, short, move = graph.linearise(x, mass / 3.0), graph.linearise(x[:3]), random(N, D)
    assert_close(record.second(move, move), short.second(move[:3], move[:3]), rtol=1e-12)
    hidden = attention(mask=padding_mask(mass == 0))
    builder = GraphBuilder(D)
    builder.add("attention", Attend(hidden))
    assert_close(builder.build()(x)[:3], replace(hidden, mask=None)(x[:3]), rtol=1e-13)


def test_a_problem_of_tokens_and_of_a_pooled_output() -> None:
    x, readout, move = TokenMeasure(random(N, D), masses(N)), random(3, D), random(2, N, D)
    tokens, pooled = network("post", 1, "gelu"), network("post", 1, "gelu", head="mean")
    for goal in (Displacement(0.1), Displacement(0.1, pool="mean"), Margin(weight=readout, pool=0)):
        problem = Problem(tokens, x, FrobeniusBall(), goal)
        expected = problem.resolved.usage(tokens(x.points + move, x.mass))
        assert_close(problem.usage(move), expected, rtol=0.0)
    problem = Problem(pooled, x, FrobeniusBall(), Displacement(0.02))
    change = torch.linalg.vector_norm(pooled(x.points + move, x.mass) - pooled(x.points, x.mass), dim=(-2, -1))
    violated_at = float(problem.resolved.violated_at)
    assert 0.02 <= violated_at <= 0.02 * (1.0 + 1e-8)  # the budget with what the clean output rounds
    assert_close(problem.usage(move), change / violated_at, rtol=1e-12)
    found = attack(problem, budget=AttackBudget(restarts=1, steps=5))
    assert found.status is Status.FOUND
    output = pooled(x.points, x.mass)
    weights = Margin(weight=torch.eye(3).double()).resolve(output, pooled.output_mass(x.mass, N)).weights
    assert weights is not None
    assert_close(weights, torch.ones(1).double(), rtol=0.0)


def test_digest_says_function_and_wiring_not_names() -> None:
    one, two = Affine(random(D, D)), Affine(random(D, D))

    def graph(first: Affine, second: Affine, order: tuple[str, str], name: str = "a") -> NetworkGraph:
        steps = (Step(name, first, ("input",)), Step("b", second, ("input",)))
        return NetworkGraph(D, (*steps, Step("out", Sum(), tuple(name if r == "a" else r for r in order))))

    base = graph(one, two, ("a", "b"))
    assert graph(one, two, ("a", "b"), name="c").digest == base.digest
    others = [graph(two, one, ("a", "b")), graph(one, two, ("b", "a")), base.part("input", "a")]
    assert len({base.digest, *(other.digest for other in others)}) == 4
    assert base.to("cpu").digest == base.digest


def test_states_keeps_what_is_asked_for() -> None:
    graph, x = network("pre", 2, "gelu", head="last", causal=True), random(2, N, D)
    every = graph.states(x)
    assert tuple(every) == graph.names
    kept = graph.states(x, keep=("block0.mlp.sum", "input"))
    assert set(kept) == {"block0.mlp.sum", "input"}
    assert_close(kept["block0.mlp.sum"], every["block0.mlp.sum"], rtol=0.0)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(graph(at).sum(), at)
    assert float(gradient.abs().max()) > 0.0


def test_refuses() -> None:
    affine, out = Affine(random(D, D)), Step("out", Sum(), ("input", "a"))
    with refused(InputError, "at least one step"):
        NetworkGraph(D, ())
    with refused(InputError, "nothing was added"):
        GraphBuilder(D).build()
    with refused(InputError, "'a'", "no earlier step"):
        NetworkGraph(D, (out,))
    with refused(InputError, "repeat", "a"):
        NetworkGraph(D, (Step("a", affine, ("input",)), Step("a", affine, ("input",)), out))
    with refused(InputError, "nothing reads b"):
        NetworkGraph(D, (Step("a", affine, ("input",)), Step("b", affine, ("input",)), out))
    with refused(InputError, "step out", "one width"):
        NetworkGraph(D, (Step("a", Affine(random(D, 3)), ("input",)), out))
    with refused(InputError, "reads 1 states", "takes 2"):
        Step("x", Product(), ("input",))
    with refused(InputError, "does not depend on a alone", "input"):
        NetworkGraph(D, (Step("a", affine, ("input",)), out), depth_names=("a",))
    graph = NetworkGraph(D, (Step("a", affine, ("input",)), out))
    with refused(UnknownNameError, "inptu", "input"):
        graph.tail("inptu")
    with refused(InputError, "out is not computed from out alone"):
        graph.tail("out")
    with refused(InputError, "width 3"):
        graph(random(N, 3))
    pooled = (Step("pool", PoolMean(), ("input",)), Step("sum", Sum(), ("input", "pool")))
    with refused(InputError, "equally many tokens"):
        NetworkGraph(D, pooled)(random(N, D))
    token = NetworkGraph(D, (Step("class", ConcatTokens(random(1, D)), ("input",)), Step("s", Scale(2.0), ("class",))))
    assert token(random(N, D)).shape == (N + 1, D)
    with refused(InputError, "unequal masses"):
        token(random(N, D), masses(N))
    assert math.isfinite(float(graph(random(1, D)).sum()))
