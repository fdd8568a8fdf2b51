"""LayerNorm and RMSNorm: the remainder is a function of two numbers per token, bounded without a singular series.

Notation of ``layers.graph.normalise``: z, ``e' = Pi e / s``, ``p = <z, e'>/d``, ``eta = |e'|^2/d``, ``q = 2p + eta``,
``zeta = |z|^2/d < 1``, ``sigma = (1 + q)^{1/2}``. All formulas are before the weight; docs/network-composite.md, 5a.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.nodes.base import (
    Ball,
    Channel,
    Form,
    NodeRemainder,
    Reach,
    largest_eigenvalues,
    remainder_size,
)
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.node import Edges
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.numerics.rounding import ENTRY, SMALLEST, UNIT, inward, outward

BENT = 2.0 / 3.0**0.5 * (1.0 + 1e-12)
"""``|N''(v)| <= BENT / (d^{1/2} sigma^2)`` (lemma 10)."""
CELLS = 8  # of the mean of a convex function


def _path_mean(function: Callable[[Tensor], Tensor], first: Tensor, rest: Tensor) -> Tensor:
    """Upper bound of ``int_0^1 g(first + s rest) ds``, g convex on [0, 1): trapezoids; inf where the path leaves it."""
    steps = [function((first + cell / CELLS * rest).clamp_max(1.0 - UNIT)) for cell in range(CELLS + 1)]
    mean: Tensor = (0.5 * (steps[0] + steps[-1]) + torch.stack(steps[1:-1]).sum(0)) / CELLS
    return torch.where(first + rest < 1.0 - 1e-9, mean, torch.inf)


@dataclass(frozen=True, eq=False)
class _Ranges:
    """Per token: ``|p| <= radial``, ``eta <= square``, and what they say of sigma and q.

    Args:
        radial: Bound of |p|.
        square: Bound of eta.
        zeta: ``|z|^2 / d``.
        floor: ``1 - zeta = eps / s^2``.
    """

    radial: Tensor
    square: Tensor
    zeta: Tensor
    floor: Tensor

    @property
    def lowest(self) -> Tensor:
        """Lower bound of ``sigma^2 = |z + e'|^2/d + eps/s^2``, which is at least 1 - 2|p| as well."""
        apart = (self.zeta.sqrt() - self.square.sqrt() - UNIT).clamp_min(0.0).square() + self.floor
        return inward(torch.maximum(1.0 - 2.0 * self.radial, apart), ENTRY).clamp_min(SMALLEST)

    @property
    def highest(self) -> Tensor:
        """Upper bound of q."""
        return 2.0 * self.radial + self.square

    @property
    def slope(self) -> Tensor:
        """At least ``|q| / eta^{1/2}``."""
        return 2.0 * self.zeta.sqrt() + self.square.sqrt()

    @property
    def first(self) -> Tensor:
        """``sup |rho - 1|`` = |q|/(sigma (1 + sigma)): monotone in q."""
        return self._ends(lambda q, s: q / (s * (1.0 + s)))

    def second(self, power: int = 2) -> Tensor:
        """``sup |q|^(power-2) A2`` with ``A2 = rho - 1 + q/2 = q^2 (sigma + 2)/(2 sigma (1 + sigma)^2) >= 0``."""
        return self._ends(lambda q, s: q**power * (s + 2.0) / (2.0 * s * (1.0 + s) ** 2))

    def third(self, power: int = 3) -> Tensor:
        """``sup |q|^(power-3) |A3|``, power >= 1, ``A3 = A2 - 3 q^2/8 = -q^3 (3 s^2 + 9 s + 8)/(8 s (1 + s)^3)``."""
        return self._ends(lambda q, s: q**power * (3.0 * s**2 + 9.0 * s + 8.0) / (8.0 * s * (1.0 + s) ** 3))

    def fourth(self, power: int = 4) -> Tensor:
        """``sup |q|^(power-4) A4``, ``A4 = A3 + 5 q^3/16 = q^4 (5 s^3 + 20 s^2 + 29 s + 16)/(16 s (1 + s)^4) >= 0``."""
        return self._ends(
            lambda q, s: q**power * (5.0 * s**3 + 20.0 * s**2 + 29.0 * s + 16.0) / (16.0 * s * (1.0 + s) ** 4)
        )

    def _ends(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The larger value of a function of |q| and sigma that grows away from q = 0."""
        low, high = self.lowest, self.highest
        below = function((1.0 - low).clamp_min(0.0), low.sqrt())
        return torch.maximum(below, function(high, (1.0 + high).sqrt()))


class NormaliseRemainder(NodeRemainder):
    """Remainder of a normalisation.

    Args:
        port: What it reads.
        norm: The specification.
        x: Clean tokens.
    """

    def __init__(self, port: Port, norm: LayerNorm | RMSNorm, x: Float[Tensor, "n d"]) -> None:
        super().__init__(port)
        self._norm, self._width = norm, norm.width
        u = self._centre(x)
        self._size = (u.square().sum(-1, keepdim=True) / self._width + norm.eps).sqrt()
        self._z = u / self._size
        self._zeta = self._mean(self._z, self._z).clamp_max(1.0)
        self._floor = norm.eps / self._size[:, 0].square()  # 1 - zeta, without its cancellation
        self._gram = x.new_zeros(x.shape[0], self._width, self._width)
        self._radial = x.new_zeros(x.shape[0])
        self._bend, self._radial_bend = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])

    def _centre(self, a: Tensor) -> Tensor:
        return a - a.mean(dim=-1, keepdim=True) if isinstance(self._norm, LayerNorm) else a

    def _mean(self, a: Tensor, b: Tensor) -> Tensor:
        mean: Tensor = torch.linalg.vecdot(a, b, dim=-1) / self._width
        return mean

    def _scaled(self, edges: Edges) -> Tensor:
        return self._centre(edges[0]) / self._size

    @property
    def channels(self) -> Mapping[str, Channel]:
        weigh = lambda t: self._norm.weight * t  # noqa: E731
        return {"own": Channel(weigh, weigh, tuple(self._z.shape))}

    @property
    def features(self) -> int:
        return 2 * self._radial.numel()

    def observe(self, edges: Edges) -> None:
        scaled = self._scaled(edges)
        by_token = scaled.transpose(0, 1)
        self._gram += by_token.mT @ by_token
        self._radial += self._mean(self._z, scaled).square().sum(0)

    def observe_second(self, edges: Edges) -> None:
        scaled = self._scaled(edges)
        self._bend += scaled.square().sum(-1).sum(0)
        self._radial_bend += self._mean(self._z, scaled).square().sum(0)

    def settle(self) -> None:
        tangent = largest_eigenvalues(self._gram).sqrt()
        thinnest = self.port.scales[0].amin(-1)
        raw = 1.0 / (self._size[:, 0] * thinnest)
        weights = tangent.square().square()
        weights = weights + 1e-2 * weights.mean() + SMALLEST
        bend, unit = outward(self._bend.sqrt(), ENTRY), torch.ones_like(raw)
        self._shape = Reach(tangent, bend, outward(raw, ENTRY), weights, unit=unit)
        self._radial_tangent = outward(self._radial.sqrt(), ENTRY)
        self._bend_radial = outward(self._radial_bend.sqrt(), ENTRY)
        self._radial_raw = outward((self._zeta / self._width).sqrt() * raw, ENTRY)

    def own_metric(self) -> Edges:
        """What it divides by."""
        return (outward(1.0 / self._size, ENTRY).expand_as(self._z).contiguous(),)

    @property
    def _reach(self) -> Reach:
        return replace(self._shape, joint=self.joints.get("own"))

    @property
    def forms(self) -> Mapping[str, Form]:
        root = self._shape.weights.sqrt()[:, None]
        form = Form(
            lambda edges: (root * self._scaled(edges)).flatten(-2),
            lambda flat: (self._centre(flat.unflatten(-1, tuple(self._z.shape)) * root) / self._size,),
        )
        return {"own": form}

    def _ranges(self, ball: Ball) -> _Ranges:
        square = outward(self._reach.sizes(ball).square() / self._width, ENTRY)
        whole = (self._zeta / self._width).sqrt() * self._reach.rest(ball)
        rest = torch.minimum(remainder_size(self._bend_radial, self._radial_raw, ball), whole)
        radial = torch.minimum(self._radial_tangent * ball.radius + rest, (self._zeta * square).sqrt())
        return _Ranges(outward(radial, ENTRY), square, self._zeta, self._floor)

    def whole(self, ball: Ball) -> Mapping[str, float]:
        return {"own": self._remainder(ball)}

    def beyond(self, ball: Ball) -> Mapping[str, float]:
        return {"own": self._third(ball) + self._quadratic(ball)}

    def further(self, ball: Ball) -> Mapping[str, float]:
        return {"own": min(self._fourth(ball), self._third(ball) + self._cubic(ball)) + self._quadratic(ball)}

    def quadratic(self, ball: Ball) -> Mapping[str, float]:
        return {"own": self._quadratic(ball)}

    def third_readout(self, cotangent: Tensor, ball: Ball) -> float:
        """``<w c, z> [A3 + 3/8 (4 p eta + eta^2)] + <w c, e'> [A2 - eta/2]``, a multiple of ``|e'|^2`` per token."""
        r, weighed = self._ranges(ball), self._centre(self._norm.weight * cotangent)
        along = torch.linalg.vecdot(weighed, self._z, dim=-1).abs() / self._width
        across = torch.linalg.vector_norm(weighed, dim=-1) / self._width**0.5
        bent = r.third(1) * r.slope.square() + 0.375 * (4.0 * r.radial + r.square)
        turn = torch.maximum(r.second(1) * r.slope, 0.5 * r.square.sqrt())
        factor = outward(along * bent + across * turn, ENTRY).sqrt()
        return float(outward(self._reach.stacked(factor, ball) ** 2, ENTRY))

    def lift(self, ball: Ball) -> Mapping[str, float]:
        """``sup |N'(v) - N'(z)|`` per token times R."""
        return {"own": self._reach.stacked_rest(self._turn(ball), ball)}

    def drift(self, ball: Ball) -> Mapping[str, float]:
        """Per token times R: ``mean 3/2 t^2/(1 - t) + BENT b / 2``, or lift and ``N''(z)[T D, R]`` apart (lemma 10)."""
        first, rest = self._lengths(ball)
        near = _path_mean(lambda t: 1.5 * t.square() / (1.0 - t), first, rest) + 0.5 * BENT * rest
        turn = torch.minimum(outward(near, ENTRY), self._turn(ball) + outward(BENT * first, ENTRY))
        return {"own": self._reach.stacked_rest(turn, ball)}

    def _lengths(self, ball: Ball) -> tuple[Tensor, Tensor]:
        """``|(T D)'|`` and ``|R'|`` per token in shares of the sphere's radius ``d^{1/2}``."""
        first, rest = (size / self._width**0.5 for size in (self._reach.first(ball), self._reach.rest(ball)))
        return outward(first, ENTRY), outward(rest, ENTRY)

    def _turn(self, ball: Ball) -> Tensor:
        """``|N'(v) - N'(z)|`` between T D and T D + R: mean ``BENT t/(1 - t)``, or ``max(1/sigma, 1)`` (lemma 10)."""
        bent = BENT * _path_mean(lambda t: t / (1.0 - t), *self._lengths(ball))
        return outward(torch.minimum(bent, self._ranges(ball).lowest.rsqrt().clamp_min(1.0)), ENTRY)

    def _fourth(self, ball: Ball) -> float:
        """``z [A4 + 3/8 eta^2 - 5/16 (12 p^2 eta + 6 p eta^2 + eta^3)] + e' [3/8 (4 p eta + eta^2) + A3]``, and
        ``C3(e) - C3(T D)`` by ``|f'''| <= 3 sqrt(d)`` (lemma 6).
        """
        r, reach = self._ranges(ball), self._reach
        root, p, eta = r.square.sqrt(), r.radial, r.square
        rest = 0.375 * eta + 0.3125 * (12.0 * p.square() + 6.0 * p * eta + eta.square())
        turn = 0.375 * (4.0 * p + eta) * eta + r.third()
        apart = r.zeta.sqrt() * (r.fourth() + rest * eta) + root * turn
        factor = r.zeta.sqrt() * (r.fourth(3) * r.slope + rest * root) + turn
        first, size = reach.first(ball), reach.rest(ball)
        change = 0.5 * (3.0 * first.square() + 3.0 * first * size + size.square()) / self._width
        return self._stack(apart, factor, ball) + reach.stacked_rest(change, ball)

    def _cubic(self, ball: Ball) -> float:
        """``|C3(T D)|``, by the same norm."""
        size = self._reach.first(ball)
        return self._reach.stacked(0.5 * size.square() / self._width, Ball(ball.radius, 0.0, 0.0))

    def _stack(self, apart: Tensor, factor: Tensor, ball: Ball) -> float:
        """The stack over tokens of ``d^{1/2} apart_i``, each also at most ``factor_i |e'_i|``."""
        together = self._reach.stacked(factor, ball)
        return float(outward(min(self._width**0.5 * float(apart.square().sum().sqrt()), together), ENTRY))

    def _third(self, ball: Ball) -> float:
        """``z [A3 + 3/8 (4 p eta + eta^2)] + e' [A2 - eta/2]`` with A2 >= 0."""
        r = self._ranges(ball)
        root, bend = r.square.sqrt(), torch.maximum(r.second(), 0.5 * r.square)
        along = 0.375 * (4.0 * r.radial + r.square)
        apart = r.zeta.sqrt() * (r.third() + along * r.square) + root * bend
        factor = r.zeta.sqrt() * (r.third(2) * r.slope + along * root) + bend
        return self._stack(apart, factor, ball)

    def _remainder(self, ball: Ball) -> float:
        """``z [A2 - eta/2] + e' (rho - 1)``; and never more than two outputs and the first order."""
        r = self._ranges(ball)
        root = r.square.sqrt()
        apart = r.zeta.sqrt() * torch.maximum(r.second(), 0.5 * r.square) + root * r.first
        apart = torch.minimum(apart, 1.0 + r.zeta.sqrt() + root)
        factor = r.zeta.sqrt() * torch.maximum(r.second(1) * r.slope, 0.5 * root) + r.first
        return self._stack(apart, factor, ball)

    def _quadratic(self, ball: Ball) -> float:
        """``|1/2 f''[R, R]| <= sqrt(d) c eta``, c the root of a quadratic's maximum over the share of eta across z."""
        slack = 1.5 * self._floor
        a, b = (0.5 - slack).square() - 1.0, 2.0 * slack * (0.5 - slack) + 1.0
        share = torch.where(a < 0.0, (-b / (2.0 * a.clamp_max(-SMALLEST))).clamp(0.0, 1.0), torch.ones_like(a))
        top = torch.maximum(a * share.square() + b * share, (a + b).clamp_min(0.0)) + slack.square()
        factor = self._zeta.sqrt() * top.sqrt() / self._width**0.5
        reach, bent = self._reach, self._reach.bent(ball)
        form = float((factor * reach.raw.square()).max())
        apart = float((factor * reach.rest(ball).square()).square().sum().sqrt())
        mixed = float((factor * bent.square()).square().sum().sqrt())
        mixed = mixed + 2.0 * reach.raw_norm(factor * bent) * ball.rest + form * ball.rest**2
        return float(outward(min(form * ball.rho**2, apart, mixed), ENTRY))
