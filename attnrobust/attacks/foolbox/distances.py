"""Distances between carriers with the face of foolbox's: how far tokens moved, how many were copied, W_p."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.foolbox.carrier import from_carrier
from attnrobust.attacks.foolbox.library import Distance, astensor, astensor_
from attnrobust.errors import InputError
from attnrobust.numerics.transport import Order, wasserstein
from attnrobust.threats.moves import MoveThreat
from attnrobust.tokens import TokenMeasure

PULLS = 30
"""Attempts to bring a rounded point inside of its ball before it is put back to the reference."""
SMALLEST_SHARE = 1e-15
"""Parts of a plan below this share of a token's mass are rounding."""

Carrier = Float[Tensor, "b slots channels"]


class _CarrierDistance(Distance):
    """Unwraps foolbox's tensors."""

    def __call__(self, references: Any, perturbed: Any) -> Any:
        first, restore = astensor_(references)
        return restore(astensor(self.between(first.raw, astensor(perturbed).raw)))

    def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
        first, restore = astensor_(references)
        with torch.no_grad():
            return restore(astensor(self.clip(first.raw, astensor(perturbed).raw, float(epsilon))))

    def between(self, first: Carrier, second: Carrier) -> Float[Tensor, "b"]:
        """Distance of each input."""
        raise NotImplementedError

    def clip(self, first: Carrier, second: Carrier, epsilon: float) -> Carrier:
        """The second carriers, brought within epsilon of the first."""
        raise NotImplementedError


class TokenDistance(_CarrierDistance):
    """The distance of a threat; infinity where masses changed.

    Args:
        threat: The threat.
    """

    def __init__(self, threat: MoveThreat) -> None:
        self.threat = threat

    def __repr__(self) -> str:
        return f"TokenDistance({self.threat.key})"

    def between(self, first: Carrier, second: Carrier) -> Float[Tensor, "b"]:
        same = (first[..., -1] == second[..., -1]).all(dim=1)
        distance = self.threat.distance(self._moves(first, second)).to(first.dtype)
        return distance.masked_fill(~same, torch.inf)

    def clip(self, first: Carrier, second: Carrier, epsilon: float) -> Carrier:
        moves = self.threat.project(self._moves(first, second), epsilon)

        def placed(share: Tensor) -> Tensor:
            clipped = first.clone()
            clipped[..., :-1] = (first[..., :-1].to(moves.dtype) + share[:, None, None] * moves).to(first.dtype)
            return clipped

        inside = self.between(first, second) <= epsilon
        return torch.where(inside[:, None, None], second, _pulled(self.between, first, placed, epsilon))

    @staticmethod
    def _moves(first: Tensor, second: Tensor) -> Tensor:
        used = (first[..., -1:] > 0).to(torch.float64)
        return (second[..., :-1].to(torch.float64) - first[..., :-1].to(torch.float64)) * used


class CopyCount(_CarrierDistance):
    """How many slots were filled; infinity where a token of the reference lost or gained mass."""

    def __repr__(self) -> str:
        return "CopyCount()"

    def between(self, first: Carrier, second: Carrier) -> Float[Tensor, "b"]:
        used = first[..., -1] > 0
        kept = ((first[..., -1] == second[..., -1]) | ~used).all(dim=1)
        count = ((second[..., -1] > 0) & ~used).sum(dim=1).to(first.dtype)
        return count.masked_fill(~kept, torch.inf)

    def clip(self, first: Carrier, second: Carrier, epsilon: float) -> Carrier:
        """Keep the first copies, in the order of the slots."""
        extra = (second[..., -1] > 0) & (first[..., -1] <= 0)
        drop = extra & (extra.cumsum(dim=1) > epsilon)
        return second.masked_fill(drop[..., None], 0.0)


class MeasureDistance(_CarrierDistance):
    """W_p between the measures of two carriers (masses in proportion), by exact transport.

    Args:
        order: p, one of 1, 2, infinity.
    """

    def __init__(self, order: Order = 2) -> None:
        if order not in (1, 2, torch.inf):
            raise InputError(f"order {order} is not supported; use 1, 2 or infinity")
        self.order = order

    def __repr__(self) -> str:
        return f"MeasureDistance({self.order})"

    def between(self, first: Carrier, second: Carrier) -> Float[Tensor, "b"]:
        found = [self._distance(from_carrier(a), b) for a, b in zip(first, second, strict=True)]
        return torch.tensor(found, dtype=torch.float64).to(first)

    def _distance(self, clean: TokenMeasure, row: Tensor) -> float:
        return wasserstein(clean, from_carrier(row), order=self.order).upper.value

    def clip(self, first: Carrier, second: Carrier, epsilon: float) -> Carrier:
        """The point at distance epsilon on a shortest path; where it needs more slots, its small parts join others."""
        return torch.stack([self._clip_one(a, b, epsilon) for a, b in zip(first, second, strict=True)])

    def _clip_one(self, reference: Tensor, row: Tensor, epsilon: float) -> Tensor:
        clean, perturbed = from_carrier(reference), from_carrier(row)
        transport = wasserstein(clean, perturbed, order=self.order)
        if transport.upper.value <= epsilon:
            return row
        if epsilon <= 0.0:
            return reference
        plan = transport.plan.to(clean.points) / clean.mass[:, None]
        plan = torch.where(plan > SMALLEST_SHARE, plan, 0.0)
        main = plan.argmax(dim=1)
        index = torch.arange(clean.n, device=plan.device)
        rest = plan.clone()
        rest[index, main] = 0.0
        free = reference.shape[0] - clean.n
        source, sink = rest.nonzero(as_tuple=True)
        chosen = rest[source, sink].argsort(descending=True, stable=True)[:free].sort().values
        source, sink = source[chosen], sink[chosen]
        parent = torch.cat([index, source])
        move = perturbed.points[torch.cat([main, sink])] - clean.points[parent]
        share = rest[source, sink].to(reference.dtype)
        total = reference[: clean.n, -1]
        mass = torch.cat([total.clone(), share * total[source]])
        mass[: clean.n] = total.index_add(0, source, -mass[clean.n :])

        def placed(scale: Tensor) -> Tensor:
            result = torch.zeros_like(reference)
            result[: parent.shape[0], :-1] = (clean.points[parent] + scale * move).to(reference.dtype)
            result[: parent.shape[0], -1] = mass
            return result[None]

        start = reference.new_tensor([epsilon / transport.upper.value]).to(torch.float64)
        return _pulled(self.between, reference[None], placed, epsilon, start)[0]


def _pulled(
    distance: Callable[[Tensor, Tensor], Tensor],
    first: Carrier,
    placed: Callable[[Tensor], Tensor],
    epsilon: float,
    start: Float[Tensor, "b"] | None = None,
) -> Carrier:
    """Points ``placed(share)`` of the largest shares that rounding leaves within epsilon; else the reference."""
    share = torch.ones(first.shape[0], dtype=torch.float64, device=first.device) if start is None else start
    point = placed(share)
    slack = 4.0 * torch.finfo(first.dtype).eps
    for _ in range(PULLS):
        over = distance(first, point).to(torch.float64) / epsilon if epsilon > 0 else torch.full_like(share, torch.inf)
        outside = over > 1.0
        if not bool(outside.any()):
            return point
        share = torch.where(outside, share * (1.0 - slack) / over, share)
        slack *= 2.0
        point = placed(share)
    return torch.where((distance(first, point) <= epsilon)[:, None, None], point, first)
