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
        lifted: Of level 2 without cross terms: third orders of the first-order moves, and what R adds to a remainder.
    """

    second: float
    cross: float
    beyond: float
    third: float
    cross_third: float
    further: float
    whole: float
    lifted: float

    @property
    def rest_of_levels(self) -> float:
        """Levels 2 and 3: what they leave beside R2, the smallest one."""
        return smallest((self.cross + self.beyond, self.third + self.cross_third + self.further, self.lifted))

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
        owns: Norms of ports in their nodes' own metrics.
    """

    def __init__(
        self,
        remainders: Mapping[str, NodeRemainder],
        ports: Mapping[str, TargetNorms],
        radius: float,
        owns: Mapping[str, TargetNorms],
    ) -> None:
        self._radius = radius
        self._channels = {name: remainder.channels for name, remainder in remainders.items()}
        self.balls: dict[str, Ball] = {}
        self.parts: dict[str, Parts] = {}
        self.whole: Sizes = {}
        self.beyond: Sizes = {}
        self.further: Sizes = {}
        self.lifted: Sizes = {}
        self.third: Sizes = {}
        self.lift: Sizes = {}
        self.drift: Sizes = {}
        for name, remainder in remainders.items():
            self.balls[name] = Ball(radius, 0.0, 0.0)
            if name in ports:
                parts = self.parts[name] = self.at(ports[name])
                self.balls[name] = Ball(radius, parts.total, parts.rest)
                if name in owns:
                    own = self.at(owns[name])
                    self.balls[name] = Ball(radius, parts.total, parts.rest, own.total, own.rest, own.second)
            self._add(name, remainder)

    def _add(self, name: str, node: NodeRemainder) -> None:
        ball = self.balls[name]
        if not (math.isfinite(ball.rho) and math.isfinite(ball.rest)):
            nothing = dict.fromkeys(node.channels, math.inf)
            for sizes in (self.whole, self.beyond, self.further, self.lifted, self.lift, self.drift):
                self._put(sizes, name, nothing)
            self._put(self.third, name, node.beyond(ball.still))
            return
        third, lift, drift = node.beyond(ball.still), node.lift(ball), node.drift(ball)
        self._put(self.third, name, third)
        self._put(self.lift, name, lift)
        self._put(self.drift, name, drift)
        self._put(self.lifted, name, _sum(third, lift))
        self._put(self.whole, name, _smaller(node.whole(ball), _sum(node.whole(ball.still), lift)))
        self._put(self.beyond, name, _smaller(node.beyond(ball), _sum(third, drift)))
        self._put(self.further, name, _smaller(node.further(ball), _sum(node.further(ball.still), drift)))

    def of(self, name: str, sizes: Sizes) -> dict[str, float]:
        """The channels of one node."""
        return {channel: sizes[name, channel] for channel in self._channels[name]}

    @staticmethod
    def _put(sizes: Sizes, name: str, found: Mapping[str, float]) -> None:
        sizes.update({(name, channel): size for channel, size in found.items()})

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
            lifted=_carried(norms.tails, self.lifted),
        )


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {channel: size + other[channel] for channel, size in one.items()}


def _smaller(one: Mapping[str, float], other: Mapping[str, float]) -> Mapping[str, float]:
    """The smaller one of two bounds, all channels of it: each is a sum of its own channels."""
    sizes = [math.fsum(bound.values()) for bound in (one, other)]
    return other if sizes[1] < sizes[0] or math.isnan(sizes[0]) else one


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
