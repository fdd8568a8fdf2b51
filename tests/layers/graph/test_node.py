"""Every closed form of every node against nested autodiff, and the adjoints against the forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpmath import mp  # type: ignore[import-untyped]
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    Attend,
    ConcatTokens,
    Node,
    Normalise,
    PoolMean,
    PoolRow,
    Product,
    Scale,
    Sum,
)
from attnrobust.layers.graph.activation_functions import FUNCTIONS
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.variants.l2 import L2Attention
from tests.assertions import assert_close, refused, shapes_unchecked
from tests.cases import Case
from tests.layers.graph.networks import D, attention, masses, nested, random

RTOL = 1e-12
ATTENTION = 1e-15  # absolute: where a derivative vanishes, autodiff leaves the rounding of terms of size 1
Where = tuple[Node, tuple[Tensor, ...], Tensor | None]


def _nodes() -> dict[str, Callable[[], Where]]:
    def one(node: Callable[[], Node], n: int = 5, scale: float = 1.0) -> Callable[[], Where]:
        return lambda: (node(), (random(n, D, scale=scale),), masses(n))

    built: dict[str, Callable[[], Where]] = {
        "affine": one(lambda: Affine(random(D, 3), random(3))),
        "affine-no-bias": one(lambda: Affine(random(D, 3))),
        "scale": one(lambda: Scale(2.5)),
        "scale-per-coordinate": one(lambda: Scale(random(D))),
        "sum": lambda: (Sum(), (random(5, D), random(5, D)), None),
        "product": lambda: (Product(), (random(5, D), random(5, D)), None),
        "first-row": one(lambda: PoolRow(0)),
        "last-row": one(lambda: PoolRow(-1)),
        "mean": one(PoolMean),
        "mean-equal": lambda: (PoolMean(), (random(5, D),), None),
        "class-token": lambda: (ConcatTokens(random(2, D)), (random(5, D),), None),
        "positions": one(lambda: AddPositions(random(7, D))),
    }
    built |= {f"activate-{name}": one(lambda name=name: Activate(name), scale=2.0) for name in FUNCTIONS}  # type: ignore[misc]
    for norm in (LayerNorm, RMSNorm):
        for eps in (1e-12, 1e-5, 1e3):
            name = f"{norm.__name__}-{eps:g}"
            build = lambda norm=norm, eps=eps: Normalise(norm(weight=random(D), bias=random(D), eps=eps))  # noqa: E731
            built |= {name: one(build), f"{name}-one-token": one(build, n=1), f"{name}-large": one(build, scale=1e4)}
            built[f"{name}-equal-entries"] = lambda build=build: (build(), (0.1 + 0 * random(3, D),), None)  # type: ignore[misc]
    return built


NODES = _nodes()


def directions(inputs: tuple[Tensor, ...], *batch: int) -> tuple[Tensor, ...]:
    return tuple(random(*batch, *value.shape) for value in inputs)


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def check_first(node: Node, inputs: tuple[Tensor, ...], mass: Tensor | None, *, atol: float = 0.0) -> None:
    state, a = node.at(inputs, mass), directions(inputs)
    value = node.forward(inputs, mass)
    assert_close(state.jvp(a), nested(lambda *x: node.forward(x, mass), inputs, a), rtol=RTOL, atol=atol, what="jvp")
    y = torch.randn_like(value)
    assert inner((y,), (state.jvp(a),)) == pytest.approx(inner(state.vjp(y), a), rel=1e-11, abs=1e-13)
    assert value.shape[-1] == node.out_width(tuple(int(x.shape[-1]) for x in inputs))
    assert value.shape[-2] == node.out_rows(int(inputs[0].shape[-2]))


def check_higher(node: Node, inputs: tuple[Tensor, ...], mass: Tensor | None, *, atol: float = 0.0) -> None:
    state = node.at(inputs, mass)
    a, b, c = (directions(inputs) for _ in range(3))
    second, third = state.second(a, b), state.third(a, b, c)
    at = lambda *x: node.forward(x, mass)  # noqa: E731
    assert_close(second, nested(at, inputs, a, b), rtol=RTOL, atol=atol, what="second")
    assert_close(third, nested(at, inputs, a, b, c), rtol=RTOL, atol=atol, what="third")
    y = torch.randn_like(second)
    size = float(torch.linalg.vector_norm(second) * torch.linalg.vector_norm(y))
    assert inner((y,), (second,)) == pytest.approx(inner(state.second_adjoint(a, y), b), abs=1e-12 * size)
    size = float(torch.linalg.vector_norm(third) * torch.linalg.vector_norm(y))
    assert inner((y,), (third,)) == pytest.approx(inner(state.third_adjoint(a, b, y), c), abs=1e-12 * size)


def check_batches(node: Node, inputs: tuple[Tensor, ...], mass: Tensor | None) -> None:
    """Batches of directions broadcast and give each direction's own result."""
    state = node.at(inputs, mass)
    a, b, c = directions(inputs, 3, 1), directions(inputs, 2), directions(inputs)
    first, second, third = state.jvp(a), state.second(a, b), state.third(a, b, c)
    y = random(2, *first.shape[-2:])
    back = [state.vjp(y), state.second_adjoint(a, y), state.third_adjoint(a, b, y)]
    for i in range(3):
        a_i = tuple(x[i, 0] for x in a)
        assert_close(first[i, 0], state.jvp(a_i), rtol=RTOL)
        for j in range(2):
            b_j = tuple(x[j] for x in b)
            assert_close(second[i, j], state.second(a_i, b_j), rtol=RTOL)
            assert_close(third[i, j], state.third(a_i, b_j, c), rtol=RTOL)
            single = [state.vjp(y[j]), state.second_adjoint(a_i, y[j]), state.third_adjoint(a_i, b_j, y[j])]
            for many, alone in zip(back, single, strict=True):
                for edge, expected in zip(many, alone, strict=True):
                    assert_close(edge[j] if edge.ndim == 3 else edge[i, j], expected, rtol=RTOL)


@pytest.mark.parametrize("name", NODES)
def test_forms_of_every_node(name: str) -> None:
    node, inputs, mass = NODES[name]()
    check_first(node, inputs, mass)
    if name != "activate-relu":
        check_higher(node, inputs, mass)
        check_batches(node, inputs, mass)


def test_forms_of_attention(case: Case) -> None:
    node, inputs = Attend(case.attention), (case.tokens.points,)
    mass = None if case.tokens.uniform else case.tokens.mass
    check_first(node, inputs, mass, atol=ATTENTION)
    check_higher(node, inputs, mass, atol=ATTENTION)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"mask": torch.zeros(5, 5).masked_fill(torch.eye(5) > 0, -math.inf)}]
)
def test_batches_of_attention(options: dict[str, Any]) -> None:
    check_batches(Attend(attention(**options)), (random(5, D),), masses(5))


def test_attention_without_output_weights() -> None:
    w = random(2, D, 3)
    check_batches(Attend(Attention(w_q=w, w_k=random(2, D, 3), w_v=random(2, D, 2))), (random(5, D),), None)


def test_saturated_attention_keeps_its_digits() -> None:
    """A weight within 1e-22 of 1: the derivatives that are left are the small weights', and all their digits count."""
    layer = Attention(w_q=_row(1.0), w_k=_row(1.0), w_v=_row(1.0), scale=1.0)
    x, a = torch.tensor([[3.0], [20.0], [1.0]], dtype=torch.float64), random(3, 1)
    state = Attend(layer).at((x,))
    found = [state.jvp((a,)), state.second((a,), (a,)), state.third((a,), (a,), (a,))]
    with mp.workdps(80):
        points, steps = [mp.mpf(float(t)) for t in x], [mp.mpf(float(t)) for t in a]

        def at(t: Any) -> Any:
            moved = [p + t * s for p, s in zip(points, steps, strict=True)]
            weights = [mp.exp(moved[0] * other) for other in moved]
            # Less the likeliest value, whose own change the derivatives below do not contain.
            return sum(w * (v - moved[1]) for w, v in zip(weights, moved, strict=True)) / sum(weights)

        series = mp.taylor(at, 0, 3)
    for order, (value, factor) in enumerate(zip(found[1:], (2, 6), strict=True), start=2):
        assert float(value[0, 0]) == pytest.approx(float(series[order] * factor), rel=1e-11, abs=0.0)


def _row(value: float) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.float64)


def test_derivatives_of_activations_far_out() -> None:
    """The tails of the derivatives keep their digits where ``1 - tanh^2`` would have none."""
    x = [-20.0, -3.0, 0.0, 25.0]
    exact: dict[str, Callable[[Any], Any]] = {
        "gelu": lambda t: t * mp.erfc(-t / mp.sqrt(2)) / 2,
        "gelu_tanh": lambda t: t / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (t + mp.mpf(0.044715) * t**3))),
        "quick_gelu": lambda t: t / (1 + mp.exp(-mp.mpf(1.702) * t)),
        "silu": lambda t: t / (1 + mp.exp(-t)),
        "tanh": mp.tanh,
        "sigmoid": lambda t: 1 / (1 + mp.exp(-t)),
    }
    for name, function in exact.items():
        scalar = FUNCTIONS[name]
        assert scalar.higher is not None
        at = torch.tensor(x, dtype=torch.float64)
        orders = (scalar.slope(at), *scalar.higher(at))
        for index, point in enumerate(x):
            with mp.workdps(200):
                series = mp.taylor(function, mp.mpf(point), 3)
            for order, values in enumerate(orders, start=1):
                expected = float(series[order] * math.factorial(order))
                assert float(values[index]) == pytest.approx(expected, rel=1e-10, abs=1e-200), (name, point, order)


def test_relu_has_no_taylor_form() -> None:
    state = Activate("relu").at((random(2, D),))
    with refused(UnsupportedModelError, "relu", "Taylor"):
        state.second((random(2, D),), (random(2, D),))
    with refused(UnsupportedModelError, "relu"):
        state.third_adjoint((random(2, D),), (random(2, D),), random(2, D))


def test_masses() -> None:
    x, mass = random(4, D), torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert_close(PoolMean().forward((x,), mass)[0], 0.5 * x[0] + 0.25 * (x[1] + x[2]), rtol=1e-14)
    assert_close(PoolMean().forward((x,), 8.0 * mass), PoolMean().forward((x,), mass), rtol=1e-14)
    assert PoolMean().out_mass(mass, 4) is None
    with_token = ConcatTokens(x[:1], mass=torch.tensor([0.5], dtype=torch.float64))
    for own, rows, expected in (
        (2.0 * mass, 4, torch.cat([mass[:1], mass])),
        (None, 2, torch.full((3,), 0.5).double()),
    ):
        found = with_token.out_mass(own, rows)
        assert found is not None
        assert_close(found, expected, rtol=1e-14)
    assert ConcatTokens(x[:1]).out_mass(None, 4) is None
    with refused(InputError, "unequal masses", "give ConcatTokens"):
        ConcatTokens(x[:1]).out_mass(mass, 4)


def test_refuses() -> None:
    wrong: Any = "gleu"
    with refused(InputError, "width 4", "width 3"):
        Affine(random(4, 2)).out_width((3,))
    with refused(InputError, "width 4", "3"):
        Attend(attention()).out_width((3,))
    with refused(InputError, "one width", "3, 4"):
        Sum().out_width((3, 4))
    with refused(InputError, "equally many tokens", "1, 5"):
        Sum().forward((random(5, D), random(1, D)))
    with refused(InputError, "equally many tokens"):
        Product().forward((random(5, D), random(1, D)))
    with refused(InputError, "row 5"):
        PoolRow(5).forward((random(5, D),))
    with refused(InputError, "8 tokens", "7 position"):
        AddPositions(random(7, D)).forward((random(8, D),))
    with refused(InputError, "positive"):
        ConcatTokens(random(1, D), mass=torch.zeros(1))
    with shapes_unchecked(), refused(InputError, r"bias must have shape \(3,\)"):
        Affine(random(D, 3), random(4))
    with refused(InputError, "NaN"):
        Scale(math.nan)
    with shapes_unchecked(), refused(UnknownNameError, "gelu"):
        Activate(wrong)
    with shapes_unchecked(), refused(UnsupportedModelError, "L2Attention"):
        other: Any = L2Attention(w_q=random(1, D, 2), w_v=random(1, D, 2))
        Attend(other)
    with shapes_unchecked(), refused(UnsupportedModelError, "Affine"):
        affine: Any = Affine(random(D, D))
        Normalise(affine)


def test_digests_differ() -> None:
    weight, norm = random(D, D), LayerNorm(weight=torch.ones(D))
    nodes: list[Node] = [Affine(weight), Affine(weight.T), Affine(weight, weight[0]), Scale(2.0), Scale(3.0), Sum()]
    nodes += [Product(), PoolRow(0), PoolRow(1), PoolMean(), Activate("gelu"), Activate("silu"), Normalise(norm)]
    nodes += [Normalise(LayerNorm(weight=torch.ones(D), eps=0.1)), ConcatTokens(weight), AddPositions(weight)]
    nodes += [Attend(attention()), Attend(attention())]
    assert len({node.digest for node in nodes}) == len(nodes)
    assert [node.to("cpu").digest for node in nodes] == [node.digest for node in nodes]
