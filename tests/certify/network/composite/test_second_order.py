"""The composite norms against their definitions, sketches against chi-square, top eigenvalues against the truth."""

import math

import pytest
import torch
from scipy.stats import chi2

from attnrobust.certify.network.composite.second_order import Moves, SecondOrder
from attnrobust.certify.network.composite.sketch import (
    all_pairs,
    basis,
    deflated,
    gaussian,
    gaussian_pairs,
    inflation,
    pair_inflation,
)
from attnrobust.certify.network.composite.targets import Target
from attnrobust.certify.network.composite.third_order import ThirdOrder
from attnrobust.certify.network.composite.top_eigenvalue import Operator, top_eigenvalue
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.lanczos import largest_eigenvalue_upper
from tests.assertions import assert_close
from tests.certify.network.composite.cases import Case
from tests.layers.graph.networks import D, masses, network, random

CPU = torch.device("cpu")


def case() -> Case:
    return Case(network("post", 1, "gelu", gated=True), random(2, D), masses(2))


def unit(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def test_curvature_is_the_unfolding_of_the_second_derivative() -> None:
    prepared = case().prepared()
    record, moves = prepared.record, prepared.moves
    second = SecondOrder(record, moves, prepared.metrics.ports, unit(moves.size))
    tokens = moves.tokens(unit(moves.size))
    targets: list[Target] = [*prepared.metrics.ports[1:], prepared.output]
    for target in targets:
        forms = {name: record.second(tokens[:, None], tokens[None], stop=name) for name in target.states}
        flat = target.flat(forms)
        assert_close(
            second.curvature(target).product(unit(moves.size)), torch.einsum("avk,awk->vw", flat, flat), rtol=1e-11
        )


def test_cross_terms_are_the_second_derivative_with_remainders() -> None:
    """Their derivative in R at one node is a node's form carried by the tail."""
    prepared = case().prepared()
    record, moves, ports = prepared.record, prepared.moves, prepared.metrics.ports
    second = SecondOrder(record, moves, ports, unit(moves.size))
    sources = [port for port in second.upstream(prepared.output) if second.upstream(port)]
    along = record.along(moves.tokens(unit(moves.size))).features
    columns = []
    for port in sources:
        other = record.nodes[port.name].features(port.edges(unit(port.size)[:, None]))
        image = record.push(
            {port.name: record.nodes[port.name].bilinear(along[port.name], other)}, prepared.output.states
        )
        columns.append(prepared.output.flat(image))
    stacked = torch.cat(columns)
    operator = second.cross(prepared.output, sources)
    assert_close(operator.product(unit(operator.size)), torch.einsum("vak,wak->vw", stacked, stacked), rtol=1e-11)


def test_third_order_is_the_unfolding_of_the_third_derivative() -> None:
    prepared = case().prepared()
    record, moves, size = prepared.record, prepared.moves, prepared.moves.size
    tokens, pairs = moves.tokens(unit(size)), all_pairs(size, CPU)
    form = record.third(tokens[:, None, None], tokens[None, :, None], tokens[None, None])
    flat = prepared.output.flat({prepared.output.state: form})
    operator = ThirdOrder(record, moves, (pairs.first, pairs.second)).curvature(prepared.output)
    assert_close(operator.product(unit(size)), torch.einsum("abvk,abwk->vw", flat, flat), rtol=1e-10)


@pytest.mark.parametrize("count", [8, 64, 256])
@pytest.mark.parametrize("failure", [1e-3, 1e-9, 1e-12])
def test_inflation_is_at_least_the_quantile(count: int, failure: float) -> None:
    exact = count / float(chi2.ppf(failure, count))
    assert exact <= inflation(count, failure) <= exact * (1.3 if count >= 64 else 3.0)


def test_sketches_fail_as_rarely_as_they_say() -> None:
    """One fixed matrix of rank one, the worst case: 4000 sketches at failure 0.05."""
    single, paired = 0, 0
    for seed in range(4000):
        sketch = gaussian(3, 4, failure=0.05, seed=seed, device=CPU)
        single += float(sketch.inflation * sketch.directions[:, 0].square().sum()) < 1.0
        pairs = gaussian_pairs(3, 4, failure=0.05, seed=seed, device=CPU)
        paired += float(pairs.inflation * (pairs.first[:, 0] * pairs.second[:, 0]).square().sum()) < 1.0
    assert 0 < single <= 0.05 * 4000
    assert 0 < paired <= 0.05 * 4000


def test_a_sketch_beside_known_directions() -> None:
    """What the known directions see is exact; the rest fails as rarely as the sketch says."""
    known = torch.linalg.qr(random(4, 2)).Q.T
    inside, across = random(2) @ known, random(4)
    failures = 0
    for seed in range(1000):
        found = deflated(gaussian(4, 4, failure=0.05, seed=seed, device=CPU), known)
        assert_close((found.directions @ inside).square().sum(), inside.square().sum(), rtol=1e-12)
        failures += float(found.inflation * (found.directions @ across).square().sum()) < float(across.square().sum())
    assert 0 < failures <= 0.05 * 1000


def test_pair_inflation_costs_more_than_one_index_and_falls() -> None:
    values = [pair_inflation(count, 1e-9) for count in (32, 128, 512)]
    assert values == sorted(values, reverse=True)
    assert inflation(512, 1e-9) < values[-1] < 2.5


def test_a_basis_is_an_identity() -> None:
    matrix, form = random(3, 5), random(5, 5)
    form = form + form.T
    assert_close((matrix @ basis(5, CPU).directions.T).square().sum(), matrix.square().sum(), rtol=1e-13)
    pairs = all_pairs(5, CPU)
    values = torch.einsum("sa,ab,sb->s", pairs.first, form, pairs.second)
    assert_close(values.square().sum(), form.square().sum(), rtol=1e-13)


@pytest.mark.parametrize("size", [30, 900])
def test_top_eigenvalue_is_an_upper_bound_and_near(size: int) -> None:
    values = torch.linspace(-0.5, 1.0, size, dtype=torch.float64).pow(3)
    operator = Operator(lambda v: v * values, size, size)
    chance = Chance(0, "test", 1e-9, 400)
    found = top_eigenvalue(operator, chance, device=CPU, tolerance=0.02)
    assert 1.0 <= found <= 1.03
    assert (chance.spent > 0.0) == (size > 400)


def test_of_two_starts_the_larger_bound_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start has the root of the failure probability, and streams of its own."""
    from attnrobust.certify.network.composite import top_eigenvalue as module

    calls: list[dict[str, float]] = []
    truth = largest_eigenvalue_upper

    def spied(*args: object, **options: object) -> object:
        calls.append(dict(options))  # type: ignore[arg-type]
        return truth(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "largest_eigenvalue_upper", spied)
    chance = Chance(0, "test", 1e-9, 10)
    top_eigenvalue(Operator(lambda v: v, 500, 500), chance, device=CPU)
    assert len({call["seed"] for call in calls}) == 2
    assert math.prod(call["failure_probability"] for call in calls) == pytest.approx(chance.spent, rel=1e-9)


def test_moves_embed_and_restrict() -> None:
    moves = Moves(torch.tensor([True, False, True]), 2)
    flat = random(4)
    assert_close(moves.flat(moves.tokens(flat)), flat, rtol=0.0)
    assert float(moves.tokens(flat)[1].abs().max()) == 0.0
