"""Bounds of the remainder at every port at one radius, node after node; docs/network-composite.md, section 3."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attnrobust.certify.network.composite.nodes.base import NodeRemainder
from attnrobust.numerics.rounding import FORMULA, outward


@dataclass(frozen=True, eq=False)
class TargetNorms:
    """What the preparation proves of one target, in its metric.

    Args:
        curvature: ``tau``: ``|1/2 D2[D, D]| <= tau r^2 / 2``.
        cross: ``C``: ``|cross[D, R]| <= r C (sum rho_m^2)^{1/2}``.
        sources: The ports that the cross term stacks.
        tails: Norm of ``Y_{m->l} emit`` by node and channel.
    """

    curvature: float
    cross: float
    sources: tuple[str, ...]
    tails: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Parts:
    """A bound of a target's remainder, taken apart.

    Args:
        second: ``tau r^2 / 2``.
        cross: Second derivative between the first order and remainders.
        beyond: Quadratic terms of remainders, and everything of third and higher order, carried by clean tails.
        whole: The other way: every node's whole remainder, carried by clean tails.
    """

    second: float
    cross: float
    beyond: float
    whole: float

    @property
    def total(self) -> float:
        """The smaller of the two bounds."""
        composite = self.second + self.cross + self.beyond
        found = min((value for value in (composite, self.whole) if not math.isnan(value)), default=math.inf)
        return outward(found, FORMULA)


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
        self.rho: dict[str, float] = {}
        self.parts: dict[str, Parts] = {}
        self._beyond: dict[tuple[str, str], float] = {}
        self._whole: dict[tuple[str, str], float] = {}
        for name, remainder in remainders.items():
            self.rho[name] = 0.0
            if name in ports:
                self.parts[name] = self.at(ports[name])
                self.rho[name] = self.parts[name].total
            self._add(name, remainder)

    def _add(self, name: str, remainder: NodeRemainder) -> None:
        beyond, whole = (
            bound(self._radius, self.rho[name]) if math.isfinite(self.rho[name]) else {}
            for bound in (remainder.beyond, remainder.whole)
        )
        for channel in remainder.channels:
            self._beyond[name, channel] = beyond.get(channel, math.inf)
            self._whole[name, channel] = whole.get(channel, math.inf)

    def at(self, norms: TargetNorms) -> Parts:
        """The remainder of one target, from those of the nodes before it."""
        stacked = math.sqrt(math.fsum(self.rho[name] ** 2 for name in norms.sources))
        return Parts(
            second=0.5 * norms.curvature * self._radius**2,
            cross=norms.cross * self._radius * stacked if norms.sources else 0.0,
            beyond=_carried(norms.tails, self._beyond),
            whole=_carried(norms.tails, self._whole),
        )


def _carried(tails: Mapping[tuple[str, str], float], sizes: Mapping[tuple[str, str], float]) -> float:
    """``sum tail * size``, where nothing times anything is nothing."""
    return math.fsum(tail * sizes[key] for key, tail in tails.items() if tail > 0.0 and sizes[key] > 0.0)
