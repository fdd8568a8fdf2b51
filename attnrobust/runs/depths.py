"""Radii of a whole model by the depth at which its tokens move."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from attnrobust.runs.rows import Row, layer_order, median


@dataclass(frozen=True)
class DepthRadii:
    """A whole model with its tokens moving at one depth, over all inputs; radii are shares of the norm of the tokens.

    Args:
        depth: Its name.
        rows: Number of rows.
        found: Rows with a verified attack.
        attacks: Smallest, median and largest attack radius; None where no attack succeeded.
        certified: Smallest, median and largest certified radius, 0 where nothing is certified.
        attack_radius: Median attack radius.
        certified_radius: Median certified radius.
        input_norm: Median norm of the tokens.
        gap: Median gap.
    """

    depth: str
    rows: int
    found: int
    attacks: tuple[float, float, float] | None
    certified: tuple[float, float, float] | None
    attack_radius: float | None
    certified_radius: float | None
    input_norm: float | None
    gap: float | None


def depth_profile(rows: Iterable[Row]) -> tuple[DepthRadii, ...]:
    """Radii of whole models by the depth at which their tokens move, from the input on; rows of layers are left out."""
    groups: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.depth is not None), key=layer_order):
        groups.setdefault(row.layer, []).append(row)
    return tuple(
        DepthRadii(
            depth=depth,
            rows=len(group),
            found=sum(row.attack_radius is not None for row in group),
            attacks=_spread(row.relative_attack for row in group),
            certified=_spread(row.relative_certified for row in group),
            attack_radius=median(row.attack_radius for row in group),
            certified_radius=median(row.certified_radius for row in group),
            input_norm=median(row.input_norm for row in group),
            gap=median(row.gap for row in group),
        )
        for depth, group in groups.items()
    )


def _spread(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """Smallest, median and largest."""
    there = [value for value in values if value is not None]
    return (min(there), statistics.median(there), max(there)) if there else None
