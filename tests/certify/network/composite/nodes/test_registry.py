"""Every node's remainder bounds against ascent on the node alone, over moves and remainders at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.composite.nodes.activation_bounds import SUPREMA, oscillation
from attnrobust.certify.network.composite.nodes.attend import AttendRemainder
from attnrobust.certify.network.composite.nodes.base import Ball, NodeRemainder
from attnrobust.certify.network.composite.nodes.elementwise import ActivateRemainder, ProductRemainder
from attnrobust.certify.network.composite.nodes.normalise import NormaliseRemainder
from attnrobust.certify.network.composite.targets import Port, forwards
from attnrobust.layers.graph import Activate, Attend, Node, Normalise, Product
from attnrobust.layers.graph.activation_functions import FUNCTIONS
from attnrobust.layers.graph.attend import AttentionState
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from tests.assertions import assert_at_most
from tests.certify.network.composite.ascent import supremum
from tests.layers.graph.networks import attention, masses, random

D, N_IN = 4, 5
RADII = (3e-2, 0.3, 5.0)
NAMES = ("whole", "beyond", "further", "lift", "drift")


def settled(remainder: NodeRemainder, tangent: Tensor, bent: Tensor) -> NodeRemainder:
    """Observe the map ``tangent`` (N, edges, n, d) and half the form ``bent`` (N, N, edges, n, d), in two batches."""
    for rows in (tangent[:2], tangent[2:]):
        remainder.observe(tuple(rows[:, edge] for edge in range(tangent.shape[1])))
    for rows in (bent[:2].flatten(0, 1), bent[2:].flatten(0, 1)):
        remainder.observe_second(tuple(0.5 * rows[:, edge] for edge in range(bent.shape[2])))
    remainder.settle()
    for name, form in remainder.forms.items():
        images = form.forward(tuple(tangent[:, edge] for edge in range(tangent.shape[1])))
        remainder.joints[name] = float(torch.linalg.matrix_norm(images, 2)) * (1 + 1e-12)
    return remainder


class Attacked:
    """Ascent on the remainders of one node alone; derivatives by their tensors, as the closed products have no graph.

    Args:
        node: The node.
        clean: Its clean inputs.
        remainder: Whose bounds are attacked; it is settled here, with random first and second orders of the network.
        measure: From the node's output to where the bound speaks.
        size: Of the first order.
        mass: Masses.
    """

    def __init__(
        self, node: Node, clean: tuple[Tensor, ...], remainder: NodeRemainder, measure: Callable[[Tensor], Tensor],
        *, size: float = 0.5, mass: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.node, self.clean, self.mass, self.measure, self.remainder = node, clean, mass, measure, remainder
        self.tangent = torch.stack([random(N_IN, *part.shape, scale=size) for part in clean], dim=1)
        drawn = [random(N_IN, N_IN, *scale.shape, scale=0.2 * size) for scale in remainder.port.scales]
        self.roots = [part + part.transpose(0, 1) for part in drawn]
        maps = remainder.port.maps
        self.bent = torch.stack([forwards(part, matrix) for part, matrix in zip(self.roots, maps, strict=True)], dim=2)
        settled(remainder, self.tangent, self.bent)
        self.port, state = remainder.port, node.at(clean, mass)
        self.value = node.forward(clean, mass)
        sizes = [part.numel() for part in clean]
        units = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
        basis = tuple(unit.unflatten(-1, part.shape) for unit, part in zip(units, clean, strict=True))
        count = sum(sizes)
        self.first = state.jvp(basis).flatten(1)
        one, two, three = (tuple(e[(slice(None), *(None,) * after)] for e in basis) for after in (2, 1, 0))
        self.second = state.second(two, three).expand(count, count, *self.value.shape).flatten(2)
        self.third = state.third(one, two, three).expand(count, count, count, *self.value.shape).flatten(3)

    def found(self, radius: float, rest: float) -> dict[str, float]:
        """Largest value found of each remainder."""
        sizes = (N_IN, self.port.size)
        return {
            name: supremum(lambda d, r, at=at: self._parts(d, r)[at], (radius, rest), sizes)
            for at, name in enumerate(NAMES)
        }

    def read(self, radius: float, rest: float, cotangent: Tensor) -> float:
        """Largest value found of ``|<c, Rem(e) - 1/2 f''[e, e]>|``."""
        sizes, flat = (N_IN, self.port.size), cotangent.flatten()
        return supremum(lambda d, r: (self._third(d, r) @ flat).abs(), (radius, rest), sizes)

    def ball(self, radius: float, rest: float) -> Ball:
        """With the norm of the second order that was drawn."""
        parts = zip(self.roots, self.port.scales, strict=True)
        weighed = torch.cat([(scale * part).flatten(2) for part, scale in parts], dim=2)
        return Ball(radius, 0.5 * float(torch.linalg.matrix_norm(weighed.flatten(1), 2)) * radius**2 + rest, rest)

    def _third(self, d: Tensor, flat: Tensor) -> Tensor:
        return self._differences(d, flat)[-1]

    def _parts(self, d: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._size(out) for out in self._differences(d, flat)[:-1])

    def _differences(self, d: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        bends = torch.einsum("ba,bc,acend->bend", d, d, 0.5 * self.bent)
        raw = tuple(bends[:, edge] + part for edge, part in enumerate(self.port.edges(flat)))
        first = torch.einsum("ba,aend->bend", d, self.tangent)
        e = tuple(first[:, edge] + part for edge, part in enumerate(raw))
        moved = self.node.forward(tuple(x + step for x, step in zip(self.clean, e, strict=True)), self.mass)
        whole, part, tangent = (torch.cat([edge.flatten(1) for edge in es], dim=1) for es in (e, raw, first.unbind(1)))
        rest = (moved - self.value).flatten(1) - whole @ self.first
        square = [torch.einsum("bk,kly,bl->by", x, self.second, x) for x in (whole, part)]
        cube = torch.einsum("bj,bk,jkly,bl->by", tangent, tangent, self.third, tangent)
        beyond = rest - 0.5 * square[0] + 0.5 * square[1]
        still = self.node.forward(
            tuple(x + step for x, step in zip(self.clean, first.unbind(1), strict=True)), self.mass
        )
        lift = rest - ((still - self.value).flatten(1) - tangent @ self.first)
        drift = lift - torch.einsum("bk,kly,bl->by", tangent, self.second, part)
        return rest, beyond, beyond - cube / 6.0, lift, drift, rest - 0.5 * square[0]

    def _size(self, out: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(self.measure(out.unflatten(1, self.value.shape)), dim=(1, 2))
        return size


def check(attack: Attacked, *, mixing: float = 1.0) -> float:
    """Assert every bound at radii of all sizes; the largest ratio of attack and bound."""
    closest, remainder = 0.0, attack.remainder
    noise = 1e-13 * (1.0 + float(torch.linalg.vector_norm(attack.measure(attack.value))))  # attacked differences cancel
    for radius in RADII:
        for rest in (0.0, 0.2 * radius) if radius < 1.0 else (0.2 * radius,):
            found, ball = attack.found(radius, rest), attack.ball(radius, rest)
            for name in NAMES:
                bounds = getattr(remainder, name)(ball)
                bound = mixing * sum(v for key, v in bounds.items() if key != "out") + bounds.get("out", 0.0)
                if found[name] > bound * (1.0 + 1e-9) + noise:
                    raise AssertionError(f"{name} r={radius} rest={rest}: {found[name]!r} exceeds {bound!r}")
                closest = max(closest, found[name] / bound if found[name] > 1e3 * noise else 0.0)
        cotangent = random(*attack.value.shape)
        read, bound = attack.read(radius, rest, cotangent), remainder.third_readout(cotangent, ball)
        assert read <= bound * (1.0 + 1e-9) + noise * float(torch.linalg.vector_norm(cotangent)) * 10.0
    return closest


def port(*scales: Tensor, names: tuple[str, ...] = ("x",)) -> Port:
    return Port("node", names, names, (None,) * len(names), scales)


def scales(*shape: int) -> Tensor:
    return random(*shape).abs() + 0.3


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(("n", "eps", "size"), [(3, 1e-5, 1.0), (1, 10.0, 1.0), (2, 1e-12, 1e-3)])
def test_normalise(kind: Any, n: int, eps: float, size: float) -> None:
    norm = kind(weight=random(D), bias=random(D), eps=eps)
    x, token = random(n, D, scale=size), scales(n, 1).expand(n, D).contiguous() / size
    remainder = NormaliseRemainder(port(token), norm, x)
    attack = Attacked(Normalise(norm), (x,), remainder, lambda out: out / norm.weight, size=0.5 * size)
    assert check(attack) > 0.2


def test_normalise_of_equal_entries() -> None:
    norm = LayerNorm(weight=random(D), bias=random(D), eps=0.1)
    x = torch.ones(2, D, dtype=torch.float64)
    remainder = NormaliseRemainder(port(torch.ones_like(x)), norm, x)
    check(Attacked(Normalise(norm), (x,), remainder, lambda out: out / norm.weight))


@pytest.mark.parametrize("function", SUPREMA)
def test_activate(function: Any) -> None:
    x, importance = random(2, D, scale=2.0), scales(2, D)
    remainder = ActivateRemainder(port(token_scales(2)), function, x, importance)
    attack = Attacked(Activate(function), (x,), remainder, lambda out: out * importance)
    assert check(attack) > 0.2 or function == "identity"


def test_activate_behind_a_wide_map() -> None:
    """The remainder lives at a narrower state: a neuron sees it through its own weights."""
    matrix, x, importance = random(2, D), random(3, D), scales(3, D)
    scale = scales(3, 1).expand(3, 2).contiguous()
    remainder = ActivateRemainder(Port("node", ("x",), ("root",), (matrix,), (scale,)), "gelu", x, importance)
    attack = Attacked(Activate("gelu"), (x,), remainder, lambda out: out * importance)
    assert check(attack) > 0.2


def test_product() -> None:
    x, y, importance = random(2, D), random(2, D), scales(2, D)
    remainder = ProductRemainder(port(token_scales(2), token_scales(2), names=("x", "y")), importance)
    assert check(Attacked(Product(), (x, y), remainder, lambda out: out * importance)) > 0.3


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
    n, node = x.shape[0], Attend(layer)
    at, state = port(token_scales(n)), node.at((x,), mass)
    assert isinstance(state, AttentionState)
    remainder = AttendRemainder(at, state)
    if curved:
        basis = at.edges(torch.eye(at.size, dtype=torch.float64))[0]
        forms = state.second((basis[:, None],), (basis[None],)).flatten(2)
        remainder.kappa = float(torch.linalg.matrix_norm(forms.flatten(1), 2))
    outer = remainder.channels["heads"]
    images = outer.emit(torch.eye(outer.shape[0] * n * outer.shape[2], dtype=torch.float64).unflatten(-1, outer.shape))
    mixing = float(torch.linalg.matrix_norm(images.flatten(1), 2))
    check(Attacked(node, (x,), remainder, lambda out: out, mass=mass), mixing=mixing)


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
    assert_at_most(float(fourth.abs().max()) + step * 4.2 * bound.fourth, bound.fourth + 1e-15)


def lift_ratios(attack: Attacked, radius: float, rest: float) -> list[float]:
    """Of attack and bound, for what a remainder adds."""
    found, ball = attack.found(radius, rest), attack.ball(radius, rest)
    return [found[name] / getattr(attack.remainder, name)(ball)["own"] for name in ("lift", "drift")]


def test_lifts_are_near_what_one_neuron_does() -> None:
    torch.manual_seed(0)
    x, one = torch.full((1, 1), 0.1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    attack = Attacked(Activate("gelu"), (x,), ActivateRemainder(port(one), "gelu", x, one), lambda y: y)
    ratios = [lift_ratios(attack, *sizes) for sizes in ((0.1, 1e-3), (0.1, 1.0), (1.0, 0.1), (0.01, 30.0))]
    assert max(max(each) for each in ratios) <= 1.0 + 1e-9
    assert max(each[0] for each in ratios) > 0.6
    assert max(each[1] for each in ratios) > 0.4


def test_lifts_are_near_what_one_token_does() -> None:
    torch.manual_seed(0)
    norm = LayerNorm(weight=torch.ones(D, dtype=torch.float64), bias=None, eps=1e-5)
    x, one = random(1, D), torch.ones(1, D, dtype=torch.float64)
    attack = Attacked(Normalise(norm), (x,), NormaliseRemainder(port(one), norm, x), lambda y: y, size=0.2)
    ratios = [lift_ratios(attack, radius, rest) for radius, rest in ((0.3, 1e-3), (0.1, 0.3), (1e-3, 30.0))]
    assert max(max(each) for each in ratios) <= 1.0 + 1e-9
    assert max(each[0] for each in ratios) > 0.7


@pytest.mark.parametrize("function", ["gelu", "tanh", "quick_gelu"])
def test_oscillation_encloses_a_fine_grid(function: Any) -> None:
    x, size = torch.linspace(-4.0, 4.0, 41, dtype=torch.float64)[:, None], torch.tensor([[0.1, 1.0, 5.0]]).double()
    slope, steepness = FUNCTIONS[function].slope, SUPREMA[function].second
    bound = oscillation(slope, steepness, x, size)
    grid = torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    true = (slope(x[..., None] + grid * size[..., None]) - slope(x)[..., None]).abs().amax(-1)
    assert bool((true <= bound).all())
    assert bool((bound <= true + 0.2 * steepness * size).all())
