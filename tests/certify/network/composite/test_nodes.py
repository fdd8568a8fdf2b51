"""Every node's remainder bounds against ascent on the node alone, over moves and remainders at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.composite.nodes.activation_bounds import SUPREMA
from attnrobust.certify.network.composite.nodes.attend import AttendRemainder
from attnrobust.certify.network.composite.nodes.base import NodeRemainder
from attnrobust.certify.network.composite.nodes.elementwise import ActivateRemainder, ProductRemainder
from attnrobust.certify.network.composite.nodes.normalise import NormaliseRemainder
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph import Activate, Attend, Node, Normalise, Product
from attnrobust.layers.graph.activation_functions import FUNCTIONS
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from tests.assertions import assert_at_most
from tests.certify.network.composite.ascent import supremum
from tests.layers.graph.networks import attention, masses, random

D, N_IN = 4, 6
RADII = (1e-3, 0.1, 1.0, 6.0)


def settled(remainder: NodeRemainder, tangent: Tensor) -> NodeRemainder:
    """Observe the map ``tangent`` (N, edges, n, d) in two batches, and give the joint norm of the form."""
    for rows in (tangent[:2], tangent[2:]):
        remainder.observe(tuple(rows[:, edge] for edge in range(tangent.shape[1])))
    remainder.settle()
    form = remainder.form()
    if form is not None:
        images = form.forward(tuple(tangent[:, edge] for edge in range(tangent.shape[1])))
        remainder.joint = float(torch.linalg.matrix_norm(images, 2)) * (1 + 1e-12)
    return remainder


def attacked(
    node: Node, clean: tuple[Tensor, ...], remainder: NodeRemainder, tangent: Tensor, measure: Callable[[Tensor], Tensor],
    radius: float, rho: float, *, mass: Tensor | None = None,
) -> dict[str, float]:
    """Largest ``|Rem|`` and ``|Beyond|`` found, in the measure of the channels."""  # fmt: skip
    state, port = node.at(clean, mass), remainder.port
    value = node.forward(clean, mass)

    def parts(d: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        raw = port.edges(flat)
        e = tuple(torch.einsum("a,and->nd", d, tangent[:, edge]) + part for edge, part in enumerate(raw))
        rest = node.forward(tuple(x + step for x, step in zip(clean, e, strict=True)), mass) - value - _first(state, e)
        return rest, rest - 0.5 * state.second(e, e) + 0.5 * state.second(raw, raw)

    starts = [(random(N_IN), random(port.size)) for _ in range(3)]
    return {
        "whole": supremum(lambda d, r: torch.linalg.vector_norm(measure(parts(d, r)[0])), (radius, rho), starts),
        "beyond": supremum(lambda d, r: torch.linalg.vector_norm(measure(parts(d, r)[1])), (radius, rho), starts),
    }


def _first(state: Any, e: tuple[Tensor, ...]) -> Tensor:
    """``f'[e]`` by its matrix: the closed products run without autograd."""
    sizes = [part.numel() for part in e]
    columns = []
    for index, size in enumerate(sizes):
        unit = torch.eye(size, dtype=torch.float64).reshape(size, *e[index].shape)
        others = tuple(unit if at == index else torch.zeros_like(e[at]).expand(size, *e[at].shape) for at in range(len(e)))
        columns.append(state.jvp(others))
    flat = torch.cat([part.flatten() for part in e])
    return torch.einsum("k,knd->nd", flat, torch.cat(columns))


def check(node: Node, clean: tuple[Tensor, ...], remainder: NodeRemainder, tangent: Tensor, measure: Any, **options: Any) -> float:
    """Assert every bound at radii of all sizes; the largest ratio of attack and bound."""
    closest = 0.0
    for radius in RADII:
        for rho in (0.0, 0.3 * radius):
            found = attacked(node, clean, remainder, tangent, measure, radius, rho, **options)
            for name, bounds in (("whole", remainder.whole(radius, rho)), ("beyond", remainder.beyond(radius, rho))):
                assert_at_most(found[name], sum(bounds.values()), rtol=1e-9, what=f"{name} r={radius} rho={rho}")
                # below, the attacked difference is rounding
                closest = max(closest, found[name] / sum(bounds.values()) if found[name] > 1e-9 else 0.0)
    return closest


def scales(*shape: int) -> Tensor:
    return random(*shape).abs() + 0.3


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(("n", "eps", "size"), [(3, 1e-5, 1.0), (1, 1e-5, 1.0), (2, 10.0, 1.0), (2, 1e-12, 1e-3)])
def test_normalise(kind: Any, n: int, eps: float, size: float) -> None:
    norm = kind(weight=random(D), bias=random(D), eps=eps)
    x, tangent = random(n, D, scale=size), random(N_IN, 1, n, D, scale=0.5 * size)
    token = scales(n, 1).expand(n, D).contiguous() / size
    remainder = settled(NormaliseRemainder(Port("node", ("x",), (token,)), norm, x), tangent)
    closest = check(Normalise(norm), (x,), remainder, tangent, lambda out: out / norm.weight)
    assert closest > 0.2


def test_normalise_of_equal_entries() -> None:
    norm = LayerNorm(weight=random(D), bias=random(D), eps=0.1)
    x, tangent = torch.ones(2, D, dtype=torch.float64), random(N_IN, 1, 2, D, scale=0.1)
    remainder = settled(NormaliseRemainder(Port("node", ("x",), (torch.ones_like(x),)), norm, x), tangent)
    check(Normalise(norm), (x,), remainder, tangent, lambda out: out / norm.weight)


@pytest.mark.parametrize("function", SUPREMA)
def test_activate(function: Any) -> None:
    x, tangent = random(2, D, scale=2.0), random(N_IN, 1, 2, D, scale=0.5)
    importance = scales(2, D)
    remainder = settled(ActivateRemainder(Port("node", ("x",), (scales(2, D),)), function, x, importance), tangent)
    closest = check(Activate(function), (x,), remainder, tangent, lambda out: out * importance)
    assert closest > 0.3 or function == "identity"


def test_product() -> None:
    x, y, tangent, importance = random(2, D), random(2, D), random(N_IN, 2, 2, D), scales(2, D)
    port = Port("node", ("x", "y"), (scales(2, D), scales(2, D)))
    remainder = settled(ProductRemainder(port, importance), tangent)
    assert check(Product(), (x, y), remainder, tangent, lambda out: out * importance) > 0.3


@pytest.mark.parametrize("strength", [0.3, 3.0, 100.0])
@pytest.mark.parametrize(("n", "causal", "with_mass"), [(3, False, False), (3, True, True), (1, False, False)])
@pytest.mark.parametrize("curved", [False, True])
def test_attend(strength: float, n: int, causal: bool, with_mass: bool, curved: bool) -> None:
    layer = attention(width=D, strength=strength, causal=causal)
    check_attention(layer, random(n, D), masses(n) if with_mass else None, curved)


def test_attend_of_equal_tokens_without_projection() -> None:
    layer = attention(width=D)
    layer = type(layer)(w_q=layer.w_q, w_k=layer.w_k, w_v=layer.w_v)
    check_attention(layer, random(1, D).expand(3, D).contiguous(), None, True)


def check_attention(layer: Any, x: Tensor, mass: Tensor | None, curved: bool) -> None:
    n = x.shape[0]
    tangent, token = random(N_IN, 1, n, D, scale=0.5), scales(n, 1).expand(n, D).contiguous()
    node, port = Attend(layer), Port("node", ("x",), (token,))
    state: Any = node.at((x,), mass)
    remainder = AttendRemainder(port, state)
    settled(remainder, tangent)
    if curved:
        basis = port.edges(torch.eye(port.size, dtype=torch.float64))[0]
        forms = state.second((basis[:, None],), (basis[None],)).flatten(2)
        remainder.kappa = float(torch.linalg.matrix_norm(forms.flatten(1), 2))
    outer = remainder.channels["heads"]
    images = outer.emit(torch.eye(outer.shape[0] * n * outer.shape[2], dtype=torch.float64).unflatten(-1, outer.shape))
    mixing = float(torch.linalg.matrix_norm(images.flatten(1), 2))
    for radius in RADII:
        for rho in (0.0, 0.3 * radius):
            found = attacked(node, (x,), remainder, tangent, lambda out: out, radius, rho, mass=mass)
            for name, bounds in (("whole", remainder.whole(radius, rho)), ("beyond", remainder.beyond(radius, rho))):
                bound = mixing * bounds["heads"] + bounds["out"]
                assert_at_most(found[name], bound, rtol=1e-9, what=f"{name} r={radius} rho={rho}")


@pytest.mark.parametrize("function", SUPREMA)
def test_suprema_of_derivatives(function: Any) -> None:
    """The largest value on a grid, plus what lies between its points, is below the constant; no constant is loose."""
    step = 1e-4
    x = torch.arange(-30.0, 30.0, step, dtype=torch.float64)
    higher, bound = FUNCTIONS[function].higher, SUPREMA[function]
    assert higher is not None
    second, third = higher(x)
    fourth = (third[1:] - third[:-1]) / step  # a mean value of the fourth derivative over each cell
    for found, constant, following in ((second, bound.second, bound.third), (third, bound.third, bound.fourth)):
        assert_at_most(float(found.abs().max()) + 0.5 * step * following, constant)
        assert_at_most(constant, 1.02 * float(found.abs().max()) + 1e-12)
    assert_at_most(float(fourth.abs().max()) + step * 17.0 * bound.fourth, bound.fourth + 1e-15)
