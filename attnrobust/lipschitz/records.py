"""The records of a table of Lipschitz bounds."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from attnrobust.certify.closed_form.claims import Quantity
from attnrobust.results import Kind, NotApplicable


@dataclass(frozen=True, kw_only=True)
class BoundRow:
    """One Lipschitz upper bound that applies.

    Args:
        name: Short name; ``castin2024-derived``, ...
        quantity: What is bounded.
        region: On what set.
        conditions: When it holds.
        reference: Paper and form, or "derived" with the place of the proof.
        kind: How far it is proved.
        failure_probability: 0 unless the kind is probabilistic.
        value: The bound; infinity where the formula leaves float64 and says nothing.
        ratio: Value over the best lower bound of the same quantity; None where none is known.
    """

    name: str
    quantity: Quantity
    region: str
    conditions: str
    reference: str
    kind: Kind
    failure_probability: float
    value: float
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class LowerRow:
    """A lower bound: a value that is reached.

    Args:
        name: How it was found.
        quantity: Of what.
        value: The lower bound.
        where: The input that shows it.
    """

    name: str
    quantity: Quantity
    value: float
    where: str


@dataclass(frozen=True, kw_only=True)
class BoundsTable:
    """Every Lipschitz bound of one layer.

    Args:
        layer: Kind of the layer's specification.
        n: Token count.
        width: Token width.
        radius: Radius R of the ball that holds the tokens.
        epsilon: Size of the finite moves; None without an input.
        bounds: What applies.
        lower_bounds: What is known from below, the best first in each quantity.
        skipped: What does not apply, and why.
    """

    layer: str
    n: int
    width: int
    radius: float
    epsilon: float | None
    bounds: tuple[BoundRow, ...]
    lower_bounds: tuple[LowerRow, ...]
    skipped: tuple[NotApplicable, ...]

    def best_lower(self, quantity: Quantity) -> LowerRow | None:
        """The largest lower bound of a quantity."""
        return next((row for row in self.lower_bounds if row.quantity == quantity), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; infinity becomes None."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, StrEnum) else value
