"""What a search may use instead of what a proof needs: estimates, interpolation, float32. Nothing here is claimed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.constants import Constants, RowGeometry, largest_quadratic
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.numerics.eigenvalues import spread_vector

POWER_STEPS = 4  # of an eigenvalue; each reads a Gram tensor
KEPT = 3  # radii whose constants are kept
NEAR = 0.08  # of log r: so far constants are extrapolated from two others
SMALLEST = 1e-30  # of a constant whose logarithm is interpolated
CAST = ("points", "movable", "lengths")
CACHED = ("log_weight", "weight", "queries", "keys", "projection", "key_gram")


def lowered(functional: FunctionalRows) -> FunctionalRows:
    """The functional in float32; unchanged for rows on their own and with rotary positions (angles are float64)."""
    if functional.rows.layer.rotary is not None or functional.rows.at is not None:
        return functional
    given = {name: getattr(functional.rows, name) for name in CAST}
    rows = replace(functional.rows, **{name: value.float() for name, value in given.items() if value is not None})
    rows.__dict__.update({name: getattr(functional.rows, name).float() for name in CACHED})  # the cached properties
    low = FunctionalRows(rows, functional.pooling.float(), functional.gamma.float(), functional.advantage.float())
    low.__dict__.update({name: getattr(functional, name).float() for name in ("first_norm", "gradient")})
    return low


def cast(const: Constants, dtype: torch.dtype) -> Constants:
    """Constants in another precision."""
    if const.limit.dtype == dtype:
        return const
    given = {f.name: getattr(const, f.name) for f in fields(const)}
    changed: dict[str, Any] = {name: value.to(dtype) for name, value in given.items() if isinstance(value, Tensor)}
    return replace(const, **changed)


@dataclass(eq=False)
class RunningSpread:
    """``spread_eigenvalue`` of every row, for the lengths of the rows, from below: one power step at each call."""

    vector: Float[Tensor, "h q n"] | None = None

    def __call__(self, rows: MarginRows, coefficient: Float[Tensor, "h q n"]) -> Float[Tensor, "h q"]:
        """Rayleigh quotient at the present vector, differentiable in the coefficient."""
        weight, reach = rows.weight, rows.reach
        if self.vector is None:
            self.vector = spread_vector(coefficient.detach(), weight, reach)
        move = reach * self.vector
        along = move - (weight * move).sum(-1, keepdim=True)
        with torch.no_grad():
            image = coefficient.detach() * along
            image = (image - weight * image.sum(-1, keepdim=True)) * reach
            length = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
            self.vector = torch.where(length > 0.0, image / length, self.vector)
        value: Tensor = (coefficient * along.square()).sum(-1)
        return value


def rough_quadratic(rows: MarginRows, geo: RowGeometry, coefficient: Float[Tensor, "h q n"]) -> Float[Tensor, "h q"]:
    """``lambda_max(sum_j c_j l_j l_j^T)`` from below, by power steps from the largest coefficients."""
    if geo.gram is None:
        return largest_quadratic(rows, geo, coefficient)
    root = coefficient.sqrt()
    vector = root
    for _ in range(POWER_STEPS):
        image = root * (geo.gram @ (root * vector)[..., None])[..., 0]
        vector = image / torch.linalg.vector_norm(image, dim=-1, keepdim=True).clamp_min(SMALLEST)
    value: Tensor = torch.linalg.vector_norm(root * (geo.gram @ (root * vector)[..., None])[..., 0], dim=-1)
    return value


@dataclass(eq=False)
class ConstantsCurve:
    """Constants at any radius, as powers of the radius between (and a little beyond) two where they are known.

    Args:
        exact: Constants of a radius; None where they overflow.
        rough: The same up to estimates.
    """

    exact: Callable[[float], Constants | None]
    rough: Callable[[float], Constants | None]
    nodes: dict[float, Constants] = field(default_factory=dict)
    last: tuple[float, Constants | None] | None = None

    def known(self, radius: float) -> Constants | None:
        """Exact ones of this very radius."""
        if self.last is None or self.last[0] != radius:
            self.last = (radius, self.exact(radius))
            self._keep(radius, self.last[1])
        return self.last[1]

    def __call__(self, radius: float) -> Constants | None:
        """Constants of a radius."""
        near = sorted(self.nodes, key=lambda node: abs(math.log(node / radius)))[:2]
        if len(near) < 2 or not _covers(near, radius):
            found = self.nodes.get(radius) or self.rough(radius)
            self._keep(radius, found)
            return found
        first, second = (self.nodes[node] for node in near)
        share = math.log(radius / near[0]) / math.log(near[1] / near[0])
        names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
        values = {name: _between(getattr(first, name), getattr(second, name), share) for name in names}
        return replace(first, budget=first.budget.scaled(radius / near[0]), **values)

    def _keep(self, radius: float, found: Constants | None) -> None:
        """Each costs some (h, q, n) numbers: only the nearest stay."""
        if found is not None:
            self.nodes[radius] = found
            near = sorted(self.nodes, key=lambda node: abs(math.log(node / radius)))
            self.nodes = {node: self.nodes[node] for node in near[:KEPT]}


def _covers(nodes: list[float], radius: float) -> bool:
    low, high = min(nodes), max(nodes)
    return low * math.exp(-NEAR) <= radius <= high * math.exp(NEAR) and high / low < 2.5


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    return torch.lerp(first.clamp_min(SMALLEST).log(), second.clamp_min(SMALLEST).log(), share).exp()
