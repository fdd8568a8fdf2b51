"""Affine nodes that act on the rows: pooling, a fixed class token, position embeddings."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.graph.node import AffineState, Edges, Node, NodeState, require_width
from attnrobust.tokens import require_finite


@dataclass(frozen=True, eq=False)
class PoolRow(Node):
    """``f(X) = x_row`` as one row (1, d).

    Args:
        row: Index of the row; negative ones count from the end (-1: the last token).
    """

    row: int = 0
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.row, bool) or not isinstance(self.row, int):
            raise InputError(f"row is {self.row!r}; it must be an integer")

    def out_width(self, widths: tuple[int, ...]) -> int:
        return widths[0]

    def out_rows(self, rows: int) -> int:
        return 1

    def out_mass(self, mass: Tensor | None, rows: int) -> Tensor | None:
        return None

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        at = self._index(int(inputs[0].shape[-2]))
        return inputs[0][..., at : at + 1, :]

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        rows = int(inputs[0].shape[-2])
        weights = torch.zeros(rows, dtype=torch.float64, device=inputs[0].device)
        weights[self._index(rows)] = 1.0
        return _PoolState(weights)

    def _index(self, rows: int) -> int:
        if not -rows <= self.row < rows:
            raise InputError(f"row {self.row} does not exist; the pooled state has {rows} rows")
        return self.row % rows


@dataclass(frozen=True, eq=False)
class PoolMean(Node):
    """``f(X) = sum_i mass_i x_i / sum_i mass_i`` as one row (1, d); equal masses unless given.

    The masses are those of the token measure, so a token of mass 0 (padding) does not count, and a token split into
    copies with the same total mass counts as before.
    """

    affine: ClassVar[bool] = True

    def out_width(self, widths: tuple[int, ...]) -> int:
        return widths[0]

    def out_rows(self, rows: int) -> int:
        return 1

    def out_mass(self, mass: Tensor | None, rows: int) -> Tensor | None:
        return None

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        if mass is None:
            return inputs[0].mean(dim=-2, keepdim=True)
        return _shares(mass)[..., None, :] @ inputs[0]

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        equal = torch.ones(inputs[0].shape[-2], dtype=torch.float64, device=inputs[0].device)
        return _PoolState(_shares(equal if mass is None else mass))


def _shares(mass: Tensor) -> Tensor:
    return mass / mass.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class _PoolState(AffineState):
    weights: Tensor

    def jvp(self, a: Edges) -> Tensor:
        return self.weights[None, :] @ a[0]

    def vjp(self, y: Tensor) -> Edges:
        return (self.weights[:, None] * y,)


@dataclass(frozen=True, eq=False)
class ConcatTokens(Node):
    """``f(X) = [tokens; X]``: fixed tokens before the input's, such as a class token.

    Args:
        tokens: The fixed tokens (m, d).
        mass: Their masses (m,), relative to a total mass 1 of the input's tokens; None means that they weigh as much as
            each of the input's tokens, which needs equal masses there.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite tokens, masses that are not positive.
    """

    tokens: Float[Tensor, "m d"]
    mass: Float[Tensor, "m"] | None = None
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        tokens = require_finite("tokens", self.tokens)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"tokens must have shape (m, d) with m, d >= 1; got {tuple(tokens.shape)}")
        object.__setattr__(self, "tokens", tokens)
        if self.mass is None:
            return
        mass = require_finite("mass", self.mass)
        if tuple(mass.shape) != tokens.shape[:1] or not bool((mass > 0).all()):
            raise InputError(f"mass must be {tokens.shape[0]} positive numbers, one per fixed token")
        object.__setattr__(self, "mass", mass)

    def out_width(self, widths: tuple[int, ...]) -> int:
        require_width(self.kind, int(self.tokens.shape[1]), widths)
        return widths[0]

    def out_rows(self, rows: int) -> int:
        return rows + int(self.tokens.shape[0])

    def out_mass(self, mass: Tensor | None, rows: int) -> Tensor | None:
        if self.mass is None:
            if mass is None:
                return None
            raise InputError("the tokens have unequal masses, the fixed tokens none; give ConcatTokens their mass")
        own = self.mass.new_full((rows,), 1.0 / rows) if mass is None else _shares(mass)
        return torch.cat([self.mass.expand(*own.shape[:-1], -1), own], dim=-1)

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        x = inputs[0]
        return torch.cat([self.tokens.expand(*x.shape[:-2], -1, -1), x], dim=-2)

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _ConcatState(int(self.tokens.shape[0]))


@dataclass(frozen=True)
class _ConcatState(AffineState):
    added: int

    def jvp(self, a: Edges) -> Tensor:
        return torch.nn.functional.pad(a[0], (0, 0, self.added, 0))

    def vjp(self, y: Tensor) -> Edges:
        return (y[..., self.added :, :],)


@dataclass(frozen=True, eq=False)
class AddPositions(Node):
    """``f(X)_i = x_i + table_i``: fixed position embeddings for the first n positions.

    Args:
        table: One row per position, (longest n, d).

    Raises:
        InputError: Another shape, NaN or infinite entries; in use: more tokens than positions.
    """

    table: Float[Tensor, "p d"]
    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        table = require_finite("table", self.table)
        if table.ndim != 2 or 0 in table.shape:
            raise InputError(f"table must have shape (positions, d) with both >= 1; got {tuple(table.shape)}")
        object.__setattr__(self, "table", table)

    def out_width(self, widths: tuple[int, ...]) -> int:
        require_width(self.kind, int(self.table.shape[1]), widths)
        return widths[0]

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        rows = inputs[0].shape[-2]
        if rows > self.table.shape[0]:
            raise InputError(f"the input has {rows} tokens, there are {self.table.shape[0]} position embeddings")
        return inputs[0] + self.table[:rows]

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Edges]:
        return _IdentityState()


class _IdentityState(AffineState):
    def jvp(self, a: Edges) -> Tensor:
        return a[0]

    def vjp(self, y: Tensor) -> Edges:
        return (y,)
