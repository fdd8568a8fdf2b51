"""LayerNorm and RMSNorm as a node, from the expansion of one square root.

Per token let ``u = Pi x`` be x (RMSNorm) or x less its mean (LayerNorm), ``s^2 = |u|^2 / d + eps``, ``z = u / s`` and
for a direction ``a' = Pi a / s``, ``p_a = <z, a'> / d``, ``eta_ab = <a', b'> / d``. Then, exactly,
``f(x + a) = weight (z + a') (1 + 2 p_a + eta_aa)^(-1/2) + bias``, and the binomial series gives, before the weight,
``f' = a' - z p_a``,
``f'' = z (3 p_a p_b - eta_ab) - a' p_b - b' p_a``,
``f''' = z (3 sum p_a eta_bc - 15 p_a p_b p_c) + sum a' (3 p_b p_c - eta_bc)``, sums over the three choices of one.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.node import Edges, Node, NodeState, require_width
from attnrobust.layers.normalisation import LayerNorm, RMSNorm


@dataclass(frozen=True, eq=False)
class Normalise(Node):
    """A normalisation of every token.

    Args:
        norm: The existing specification, exactly ``LayerNorm`` or ``RMSNorm``.

    Raises:
        UnsupportedModelError: Another map.
    """

    norm: LayerNorm | RMSNorm

    def __post_init__(self) -> None:
        if type(self.norm) not in (LayerNorm, RMSNorm):
            raise UnsupportedModelError(f"{type(self.norm).__name__} is not exactly LayerNorm or RMSNorm")

    @property
    def kind(self) -> str:
        return type(self.norm).__name__

    @property
    def features(self) -> frozenset[str]:
        """The class, the kind of norm and its features."""
        return super().features | {self.kind} | {f"{self.kind}.{feature}" for feature in self.norm.features}

    def out_width(self, widths: tuple[int, ...]) -> int:
        require_width(self.kind, self.norm.width, widths)
        return widths[0]

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        return self.norm(inputs[0])

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState["NormFeatures"]:
        return _NormState(self.norm, inputs[0])


@dataclass(frozen=True, eq=False)
class NormFeatures:
    """``a'`` (..., n, d) and ``p_a`` (..., n, 1) of one direction."""

    scaled: Tensor
    radial: Tensor


@dataclass(frozen=True, eq=False)
class _NormState(NodeState[NormFeatures]):
    norm: LayerNorm | RMSNorm
    x: Tensor

    def _centre(self, a: Tensor) -> Tensor:
        return a - a.mean(dim=-1, keepdim=True) if isinstance(self.norm, LayerNorm) else a

    def _mean(self, a: Tensor, b: Tensor) -> Tensor:
        """``<a, b> / d`` per token, (..., n, 1)."""
        product: Tensor = torch.linalg.vecdot(a, b, dim=-1)
        return product[..., None] / self.norm.width

    @cached_property
    def _size(self) -> Tensor:
        u = self._centre(self.x)
        return (self._mean(u, u) + self.norm.eps).sqrt()

    @cached_property
    def _z(self) -> Tensor:
        return self._centre(self.x) / self._size

    def _to_input(self, gradient: Tensor) -> Edges:
        """From the gradient in ``v'`` to that in v."""
        return (self._centre(gradient) / self._size,)

    def features(self, a: Edges) -> NormFeatures:
        scaled = self._centre(a[0]) / self._size
        return NormFeatures(scaled, self._mean(self._z, scaled))

    def jvp(self, a: Edges) -> Tensor:
        f = self.features(a)
        return self.norm.weight * (f.scaled - self._z * f.radial)

    def vjp(self, y: Tensor) -> Edges:
        w = self.norm.weight * y
        return self._to_input(w - self._z * self._mean(self._z, w))

    def bilinear(self, a: NormFeatures, b: NormFeatures) -> Tensor:
        eta = self._mean(a.scaled, b.scaled)
        out = self._z * (3.0 * a.radial * b.radial - eta) - a.scaled * b.radial - b.scaled * a.radial
        return self.norm.weight * out

    def bilinear_adjoint(self, a: NormFeatures, y: Tensor) -> Edges:
        w = self.norm.weight * y
        along, across = self._mean(w, self._z), self._mean(w, a.scaled)
        return self._to_input(self._z * (3.0 * along * a.radial - across) - a.scaled * along - w * a.radial)

    def trilinear(self, a: NormFeatures, b: NormFeatures, c: NormFeatures) -> Tensor:
        z_part, own = -15.0 * a.radial * b.radial * c.radial, torch.zeros_like(a.scaled)
        for one, two, three in ((a, b, c), (b, c, a), (c, a, b)):
            eta = self._mean(two.scaled, three.scaled)
            z_part = z_part + 3.0 * one.radial * eta
            own = own + one.scaled * (3.0 * two.radial * three.radial - eta)
        return self.norm.weight * (self._z * z_part + own)

    def trilinear_adjoint(self, a: NormFeatures, b: NormFeatures, y: Tensor) -> Edges:
        w = self.norm.weight * y
        eta, both = self._mean(a.scaled, b.scaled), a.radial * b.radial
        along, on_a, on_b = self._mean(w, self._z), self._mean(w, a.scaled), self._mean(w, b.scaled)
        z_part = along * (3.0 * eta - 15.0 * both) + 3.0 * (on_a * b.radial + on_b * a.radial)
        out = self._z * z_part + w * (3.0 * both - eta)
        out = out + a.scaled * (3.0 * along * b.radial - on_b) + b.scaled * (3.0 * along * a.radial - on_a)
        return self._to_input(out)
