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


class Attacked:
    """Ascent on the remainders of one node alone; derivatives by their matrices, as the closed products have no graph.

    Args:
        node: The node.
        clean: Its clean inputs.
        remainder: Whose port is used.
        tangent: The map from moves to the edges.
        measure: From the node's output to where the bound speaks.
        mass: Masses.
    """

    def __init__(
        self, node: Node, clean: tuple[Tensor, ...], remainder: NodeRemainder, tangent: Tensor,
        measure: Callable[[Tensor], Tensor], mass: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.node, self.clean, self.mass, self.tangent, self.measure = node, clean, mass, tangent, measure
        self.port, state = remainder.port, node.at(clean, mass)
        self.value = node.forward(clean, mass)
        sizes = [part.numel() for part in clean]
        units = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
        basis = tuple(unit.unflatten(-1, part.shape) for unit, part in zip(units, clean, strict=True))
        self.first = state.jvp(basis).flatten(1)
        form = state.second(tuple(e[:, None] for e in basis), tuple(e[None] for e in basis))
        self.second = form.expand(sum(sizes), sum(sizes), *self.value.shape).flatten(2)

    def found(self, radius: float, rho: float) -> dict[str, float]:
        """Largest ``|Rem|`` and ``|Beyond|`` found."""
        sizes = (N_IN, self.port.size)
        return {
            name: supremum(lambda d, r, at=at: self._parts(d, r)[at], (radius, rho), sizes)
            for at, name in enumerate(("whole", "beyond"))
        }

    def _parts(self, d: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.port.edges(flat)
        e = tuple(torch.einsum("ba,and->bnd", d, self.tangent[:, edge]) + part for edge, part in enumerate(raw))
        moved = self.node.forward(tuple(x + step for x, step in zip(self.clean, e, strict=True)), self.mass)
        whole, part = (torch.cat([edge.flatten(1) for edge in edges], dim=1) for edges in (e, raw))
        rest = (moved - self.value).flatten(1) - whole @ self.first
        bends = [torch.einsum("bk,kly,bl->by", x, self.second, x) for x in (whole, part)]
        sizes = (rest, rest - 0.5 * bends[0] + 0.5 * bends[1])
        return tuple(torch.linalg.vector_norm(self.measure(out.unflatten(1, self.value.shape)), dim=(1, 2)) for out in sizes)  # type: ignore[return-value]


def check(attack: Attacked, remainder: NodeRemainder, *, mixing: float = 1.0) -> float:
    """Assert every bound at radii of all sizes; the largest ratio of attack and bound."""
    closest = 0.0
    for radius in RADII:
        for rho in (0.0, 0.3 * radius):
            found = attack.found(radius, rho)
            for name, bounds in (("whole", remainder.whole(radius, rho)), ("beyond", remainder.beyond(radius, rho))):
                bound = mixing * sum(v for key, v in bounds.items() if key != "out") + bounds.get("out", 0.0)
                size = float(torch.linalg.vector_norm(attack.measure(attack.value)))
                noise = 1e-13 * (1.0 + size)  # the attacked differences cancel
                if found[name] > bound * (1.0 + 1e-9) + noise:
                    raise AssertionError(f"{name} r={radius} rho={rho}: {found[name]!r} exceeds {bound!r}")
                closest = max(closest, found[name] / bound if found[name] > 1e3 * noise else 0.0)
    return closest


def port(*scales: Tensor, names: tuple[str, ...] = ("x",)) -> Port:
    return Port("node", names, names, (None,) * len(names), scales)


def scales(*shape: int) -> Tensor:
    return random(*shape).abs() + 0.3


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(("n", "eps", "size"), [(3, 1e-5, 1.0), (1, 1e-5, 1.0), (2, 10.0, 1.0), (2, 1e-12, 1e-3)])
def test_normalise(kind: Any, n: int, eps: float, size: float) -> None:
    norm = kind(weight=random(D), bias=random(D), eps=eps)
    x, tangent = random(n, D, scale=size), random(N_IN, 1, n, D, scale=0.5 * size)
    token = scales(n, 1).expand(n, D).contiguous() / size
    remainder = settled(NormaliseRemainder(port(token), norm, x), tangent)
    attack = Attacked(Normalise(norm), (x,), remainder, tangent, lambda out: out / norm.weight)
    assert check(attack, remainder) > 0.2


def test_normalise_of_equal_entries() -> None:
    norm = LayerNorm(weight=random(D), bias=random(D), eps=0.1)
    x, tangent = torch.ones(2, D, dtype=torch.float64), random(N_IN, 1, 2, D, scale=0.1)
    remainder = settled(NormaliseRemainder(port(torch.ones_like(x)), norm, x), tangent)
    check(Attacked(Normalise(norm), (x,), remainder, tangent, lambda out: out / norm.weight), remainder)


@pytest.mark.parametrize("function", SUPREMA)
def test_activate(function: Any) -> None:
    x, tangent, importance = random(2, D, scale=2.0), random(N_IN, 1, 2, D, scale=0.5), scales(2, D)
    remainder = settled(ActivateRemainder(port(token_scales(2)), function, x, importance), tangent)
    attack = Attacked(Activate(function), (x,), remainder, tangent, lambda out: out * importance)
    assert check(attack, remainder) > 0.3 or function == "identity"


def test_activate_behind_a_wide_map() -> None:
    """The remainder lives at a narrower state: a neuron sees it through its own weights."""
    matrix, x, importance = random(2, D), random(3, D), scales(3, D)
    tangent, scale = random(N_IN, 1, 3, D, scale=0.5), scales(3, 1).expand(3, 2).contiguous()
    remainder = ActivateRemainder(Port("node", ("x",), ("root",), (matrix,), (scale,)), "gelu", x, importance)
    settled(remainder, tangent)
    attack = Attacked(Activate("gelu"), (x,), remainder, tangent, lambda out: out * importance)
    assert check(attack, remainder) > 0.3


def test_product() -> None:
    x, y, tangent, importance = random(2, D), random(2, D), random(N_IN, 2, 2, D), scales(2, D)
    remainder = settled(ProductRemainder(port(token_scales(2), token_scales(2), names=("x", "y")), importance), tangent)
    attack = Attacked(Product(), (x, y), remainder, tangent, lambda out: out * importance)
    assert check(attack, remainder) > 0.3


def token_scales(n: int) -> Tensor:
    return scales(n, 1).expand(n, D).contiguous()


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
    tangent, node, at = random(N_IN, 1, n, D, scale=0.5), Attend(layer), port(token_scales(n))
    state: Any = node.at((x,), mass)
    remainder = settled(AttendRemainder(at, state), tangent)
    if curved:
        basis = at.edges(torch.eye(at.size, dtype=torch.float64))[0]
        forms = state.second((basis[:, None],), (basis[None],)).flatten(2)
        remainder.kappa = float(torch.linalg.matrix_norm(forms.flatten(1), 2))
    outer = remainder.channels["heads"]
    images = outer.emit(torch.eye(outer.shape[0] * n * outer.shape[2], dtype=torch.float64).unflatten(-1, outer.shape))
    mixing = float(torch.linalg.matrix_norm(images.flatten(1), 2))
    check(Attacked(node, (x,), remainder, tangent, lambda out: out, mass), remainder, mixing=mixing)


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
