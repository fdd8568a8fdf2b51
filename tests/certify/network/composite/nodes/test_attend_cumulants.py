"""The orders of attention's remainder by cumulants along the path, row-head by row-head, against ascent."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnrobust.certify.network.composite.nodes.attend import AttendRemainder
from attnrobust.certify.network.composite.nodes.attend_cumulants import Bounded
from attnrobust.certify.network.composite.nodes.base import Ball
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import Attend
from attnrobust.layers.graph.attend import AttentionState
from tests.certify.network.composite.ascent import supremum
from tests.layers.graph.networks import attention, masses, random

D = 4
ORDERS = ("whole", "third", "fourth")


class Rows:
    """One layer without output projection, whose tokens move by D and, where asked for, by a raw remainder R.

    Args:
        layer: The layer.
        x: Clean tokens.
        mass: Their masses.
    """

    def __init__(self, layer: Attention, x: Tensor, mass: Tensor | None = None) -> None:
        layer = replace(layer, w_o=None, b_o=None)
        self.layer, self.x, self.mass = layer, x, mass
        state = Attend(layer).at((x,), mass)
        assert isinstance(state, AttentionState)
        self.state = state
        self.remainder = AttendRemainder(Port("a", ("x",), ("x",), (None,), (torch.ones_like(x),)), state)
        unit = torch.eye(x.numel(), dtype=torch.float64).unflatten(-1, x.shape)
        self.remainder.observe((unit,))
        self.remainder.observe_second((torch.zeros_like(unit),))
        self.remainder.settle()

    def bounded(self, order: str, radius: float, rho: float) -> Bounded:
        found: Bounded = getattr(self.remainder._cumulants(Ball(radius, rho, rho)), order)()
        return found

    def remainders(self, move: Tensor) -> dict[str, Tensor]:
        """What is left of the rows beyond every order, (b, h, n)."""
        state, features = self.state, self.state.features((move,))
        whole = self.layer(self.x + move, self.mass) - self.layer(self.x, self.mass) - state.jvp((move,))
        third = whole - 0.5 * state.bilinear(features, features)
        fourth = third - state.trilinear(features, features, features) / 6.0
        parts = {"whole": whole, "third": third, "fourth": fourth}
        return {name: torch.linalg.vector_norm(self._rows(part), dim=-1) for name, part in parts.items()}

    def _rows(self, out: Tensor) -> Tensor:
        """Per row-head: without a projection heads stand side by side."""
        rows: Tensor = out.unflatten(-1, (self.layer.heads, -1)).transpose(-3, -2)
        return rows

    def ratio(self, order: str, radius: float, rho: float) -> float:
        """Of the largest row found, and of all rows together, to their bounds."""
        bound, size = self.bounded(order, radius, rho), self.x.numel()

        def share(d: Tensor, r: Tensor) -> Tensor:
            found = self.remainders((d + r).unflatten(-1, self.x.shape))[order]
            return (found / (bound.rows + 1e-12)).flatten(1).amax(-1)

        return supremum(share, (radius, rho), (size, size), steps=10)


CASES = {
    "three tokens": lambda: Rows(attention(width=D, strength=1.0), random(3, D)),
    "one token": lambda: Rows(attention(width=D), random(1, D)),
    "equal tokens": lambda: Rows(attention(width=D, strength=3.0), random(1, D).expand(3, D).contiguous()),
    "causal, masses": lambda: Rows(attention(width=D, strength=3.0, causal=True), random(3, D), masses(3)),
    "saturated": lambda: Rows(attention(width=D, strength=100.0), random(3, D, scale=2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_stay_below(name: str) -> None:
    rows = CASES[name]()
    for order in ORDERS:
        for radius, rho in ((0.1, 0.0), (0.02, 0.1), (3.0, 0.0)):
            assert rows.ratio(order, radius, rho) <= 1.0 + 1e-6


def test_factors_stay_below() -> None:
    """``K (E l^2)^{1/2} + L |left^T e_i| + rest`` with the features of the move itself."""
    rows = CASES["three tokens"]()
    state, radius = rows.state, 0.3
    left = rows.remainder._clean.balanced_factors[0]
    moves = random(200, *rows.x.shape)
    moves = radius * moves / torch.linalg.vector_norm(moves, dim=(1, 2), keepdim=True)
    features = state.features((moves,))
    logits = (state.jacobian.weights * features.logits.square()).sum(-1).sqrt()
    queries = torch.linalg.vector_norm(torch.einsum("bnd,hdr->bhnr", moves, left), dim=-1)
    for order in ORDERS:
        factors = rows.bounded(order, radius, 0.0).factors
        bound = factors.logits * logits + factors.queries * queries + factors.rest
        assert bool((rows.remainders(moves)[order] <= bound * (1.0 + 1e-9)).all())


def test_the_bound_is_near_where_one_logit_moves() -> None:
    """Two tokens of equal weight, one narrow head: third order within a factor of the truth."""
    torch.manual_seed(1)
    layer = Attention(w_q=random(1, 1, 1), w_k=random(1, 1, 1), w_v=random(1, 1, 1))
    rows = Rows(layer, torch.tensor([[1.0], [-0.5]]).double())
    ratios = [rows.ratio(order, 1e-3, 0.0) for order in ORDERS]
    assert max(ratios) > 0.3
