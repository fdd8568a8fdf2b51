"""Bounds of the remainder at every port at one radius, node after node; docs/network-composite.md, section 3."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attnrobust.certify.network.composite.nodes.base import Ball, NodeRemainder
from attnrobust.numerics.rounding import FORMULA, outward

Sizes = dict[tuple[str, str], float]
"""By node and channel."""


@dataclass(frozen=True, eq=False)
class TargetNorms:
    """What the preparation proves of one target, in its metric.

    Args:
        curvature: ``tau``: ``|1/2 D2[D, D]| <= tau r^2 / 2``.
        third: ``sigma``: ``|1/6 D3[D, D, D]| <= sigma r^3 / 6``.
        cross: ``C``: ``|cross[D, R]| <= r C (sum rho_m^2)^{1/2}``.
        sources: The ports that the cross term stacks.
        tails: Norm of ``Y_{m->l} emit`` by node and channel.
    """

    curvature: float
    third: float
    cross: float
    sources: tuple[str, ...]
    tails: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Parts:
    """A bound of a target's remainder R = R2 + R', taken apart.

    Args:
        second: ``|R2| <= tau r^2 / 2``.
        cross: Of level 2: second derivative between the first order and R.
        beyond: Of level 2: quadratic terms of remainders and all node remainders of third order.
        third: Of level 3: ``sigma r^3 / 6``.
        cross_third: Of level 3: second derivative between the first order and R'.
        further: Of level 3: as beyond, less the third order.
        whole: Of level 1: every node's whole remainder, carried by clean tails.
    """

    second: float
    cross: float
    beyond: float
    third: float
    cross_third: float
    further: float
    whole: float

    @property
    def rest_of_levels(self) -> float:
        """Levels 2 and 3: what they leave beside R2, the smaller one."""
        return smallest((self.cross + self.beyond, self.third + self.cross_third + self.further))

    @property
    def rest(self) -> float:
        """Bound of |R'|: of the levels, the smallest."""
        return outward(smallest((self.rest_of_levels, self.whole + self.second)), FORMULA)

    @property
    def total(self) -> float:
        """Bound of |R|."""
        return outward(smallest((self.second + self.rest, self.whole)), FORMULA)


class Recursion:
    """Evaluates all targets in order at one radius.

    Args:
        remainders: Every node's, in order.
        ports: Norms of every port whose remainder does not vanish.
        radius: Frobenius norm of the move.
    """

    def __init__(
        self, remainders: Mapping[str, NodeRemainder], ports: Mapping[str, TargetNorms], radius: float
    ) -> None:
        self._radius = radius
        self.balls: dict[str, Ball] = {}
        self.parts: dict[str, Parts] = {}
        self.whole: Sizes = {}
        self.beyond: Sizes = {}
        self.further: Sizes = {}
        for name, remainder in remainders.items():
            self.balls[name] = Ball(radius, 0.0, 0.0)
            if name in ports:
                parts = self.parts[name] = self.at(ports[name])
                self.balls[name] = Ball(radius, parts.total, parts.rest)
            self._add(name, remainder)

    def _add(self, name: str, remainder: NodeRemainder) -> None:
        ball = self.balls[name]
        known = math.isfinite(ball.rho) and math.isfinite(ball.rest)
        pairs = (
            (self.whole, remainder.whole), (self.beyond, remainder.beyond), (self.further, remainder.further),
        )  # fmt: skip
        for sizes, bound in pairs:
            found = bound(ball) if known else {}
            for channel in remainder.channels:
                sizes[name, channel] = found.get(channel, math.inf)

    def at(self, norms: TargetNorms) -> Parts:
        """The remainder of one target, from those of the nodes before it."""
        radius, balls = self._radius, [self.balls[name] for name in norms.sources]
        stacked, rest = _length(ball.rho for ball in balls), _length(ball.rest for ball in balls)
        return Parts(
            second=0.5 * norms.curvature * radius**2,
            cross=_times(norms.cross * radius, stacked),
            beyond=_carried(norms.tails, self.beyond),
            third=norms.third * radius**3 / 6.0,
            cross_third=_times(norms.cross * radius, rest),
            further=_carried(norms.tails, self.further),
            whole=_carried(norms.tails, self.whole),
        )


def _length(sizes: Iterable[float]) -> float:
    return math.sqrt(math.fsum(size * size for size in sizes))


def _times(factor: float, size: float) -> float:
    """A product in which nothing times anything, infinity too, is nothing; NaN stays NaN."""
    return 0.0 if 0.0 in (factor, size) else factor * size


def _carried(tails: Mapping[tuple[str, str], float], sizes: Mapping[tuple[str, str], float]) -> float:
    return math.fsum(_times(tail, sizes[key]) for key, tail in tails.items())


def smallest(values: tuple[float, ...]) -> float:
    """The smallest of several bounds; NaN says nothing."""
    return min((value for value in values if not math.isnan(value)), default=math.inf)
