"""Moves in the few directions that rows on their own see: docs/rotary-certificates.md, section 7.

Keys and values see a token's move through the different key maps and the values' directions alone; only the tokens of
the rows also move their queries. So moves are kept in an orthonormal basis of those directions, and the rest of the
rows' own tokens in rows of their own below.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.certify.margin.rows import MarginRows

WORTH = 0.7
"""Share of the width below which the basis is worth its products."""
KEPT = ("log_weight", "weight", "queries", "keys", "beta", "pair_norm", "form_norm", "gauge")
"""What is read of the clean rows once they are reduced."""


@dataclass(frozen=True, eq=False)
class ReducedRows(MarginRows):
    """Rows whose moves are (n + q e, p): n tokens in a basis of p directions, then e rows for each row's own token.

    Args:
        basis: Orthonormal directions (w, p) of the layer's width that keys and values see.
        rest: Orthonormal directions (w, w - p) that they do not see.
    """

    basis: Float[Tensor, "w p"] = field(kw_only=True)
    rest: Float[Tensor, "w r"] = field(kw_only=True)

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.weight.shape[-1])

    @property
    def reach(self) -> Float[Tensor, "n"]:
        return self.movable[: self.tokens]

    @property
    def shared_keys(self) -> Float[Tensor, "p gk"]:
        return self._reduced["keys"]

    @property
    def asked_map(self) -> Float[Tensor, "h d k"]:
        return self._reduced["queries"]

    @property
    def _reduced(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.__dict__.setdefault("_maps", {})
        if not found:
            whole = self.layer.w_k[:: self.sharing].transpose(0, 1).flatten(1)
            turn = torch.cat([self.basis, self.rest], dim=1)
            found |= {"keys": self.basis.T @ whole, "queries": turn.T @ self.layer.w_q}
        return found

    def tokens_of(self, moves: Float[Tensor, "*b m p"]) -> Float[Tensor, "*b n p"]:
        return moves[..., : self.tokens, :]

    def asked_of(self, moves: Float[Tensor, "*b m p"]) -> Float[Tensor, "*b q d"]:
        own = moves[..., self.tokens :, :].unflatten(-2, (self.asked.numel(), -1)).flatten(-2)
        return torch.cat([moves[..., self.asked, :], own[..., : self.rest.shape[1]]], dim=-1)

    def placed(self, tokens: Float[Tensor, "*b n p"], own: Float[Tensor, "*b q d"]) -> Float[Tensor, "*b m p"]:
        p, extra = self.basis.shape[1], rows_apart(self.basis.shape)
        below = nn.functional.pad(own[..., p:], (0, extra * p - self.rest.shape[1]))
        whole = tokens.index_add(-2, self.asked, own[..., :p])
        return torch.cat([whole, below.unflatten(-1, (extra, p)).flatten(-3, -2)], dim=-2)

    def on_asked(self, values: Float[Tensor, "q"]) -> Float[Tensor, "m"]:
        tokens = torch.zeros_like(self.reach).index_add(0, self.asked, values)
        return torch.cat([tokens, values.repeat_interleave(rows_apart(self.basis.shape))])


def rows_apart(shape: Sequence[int]) -> int:
    """Rows of p numbers that hold d - p numbers."""
    d, p = shape
    return -(-(d - p) // p)


def reduced(found: Sequence[FunctionalRows]) -> list[FunctionalRows]:
    """The functionals of common rows in the directions that they see; themselves where that is not worth it."""
    rows = found[0].rows
    directions = torch.cat([rows.shared_keys, *(one.gamma.T for one in found)], dim=1)
    d, p = rows.layer.width, directions.shape[1]
    if rows.at is None or rows.layer.rotary is None or rows.lengths is not None or p > WORTH * d:
        return list(found)
    turned = torch.linalg.qr(directions, mode="complete").Q
    basis, rest = turned[:, :p].contiguous(), turned[:, p:].contiguous()
    below = rows.own_movable.repeat_interleave(rows_apart(basis.shape))
    movable = torch.cat([rows.movable, below])
    few = ReducedRows(
        rows.layer, rows.points.new_zeros(movable.shape[0], p), rows.mass, rows.at,
        movable=movable, basis=basis, rest=rest,
    )  # fmt: skip
    few.__dict__.update({name: getattr(rows, name) for name in KEPT})
    return [_of(one, few) for one in found]


def _of(one: FunctionalRows, rows: ReducedRows) -> FunctionalRows:
    changed = FunctionalRows(rows=rows, pooling=one.pooling, gamma=one.gamma @ rows.basis, advantage=one.advantage)
    changed.__dict__["first_norm"] = one.first_norm
    return changed
