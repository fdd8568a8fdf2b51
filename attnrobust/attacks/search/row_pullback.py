"""Forward, pullback and pushforward of a few rows of an attention layer: work and memory h n per row, not h n^2.

Only the queries of those rows enter; all other tokens do so by their keys and values alone, which are made once for
every group of heads that shares them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.search.pullback import columns, covers, product
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem

FEWER = 4
"""Rows are worth an evaluation of their own from so many times more tokens on."""


def asked_rows(problem: Problem) -> tuple[int, ...] | None:
    """The rows of the output that the goal looks at, where few do and the closed forms of this file are the layer."""
    weights = problem.resolved.weights
    if weights is None or problem.mass is not None or not covers(problem.network):
        return None
    rows: list[int] = weights.nonzero().flatten().tolist()
    return tuple(rows) if 0 < len(rows) * FEWER <= weights.numel() else None


class PreparedRows:
    """The rows ``at`` of one layer, for p inputs of n tokens with equal masses.

    Args:
        layer: The layer.
        n: Token count.
        at: The rows, q of them.
    """

    def __init__(self, layer: Attention, n: int, at: Int[Tensor, "q"]) -> None:
        self.layer, self.at = layer, at
        self.groups = layer.heads if layer.kv_heads is None else layer.kv_heads
        apart = slice(None, None, layer.heads // self.groups)  # the first head of every group
        self.w_q, self.w_kv = columns(layer.factor * layer.w_q), columns(torch.cat([layer.w_k, layer.w_v], -1)[apart])
        self.b_q = None if layer.b_q is None else (layer.factor * layer.b_q).flatten()
        self.b_kv = _joined(layer)[apart].flatten()
        self.w_out = None if layer.w_o is None else layer.w_o.flatten(0, 1)
        bias = layer.score_bias(n, at=at)  # (q, n) or (h, q, n)
        self.score_bias = bias if bias is None or bias.ndim == 2 else bias.unflatten(0, (self.groups, -1))

    def forward(self, x: Float[Tensor, "p r n d"]) -> "RowTape":
        """Evaluate the rows and keep what the derivatives need."""
        query = product(x[..., self.at, :], self.w_q)
        queries = self.asked(query if self.b_q is None else query + self.b_q)
        keys, values = self.tokens(product(x, self.w_kv).add_(self.b_kv))
        scores = self.times(queries, keys)
        if self.score_bias is not None:
            scores = scores + self.score_bias
        weights = torch.softmax(scores, dim=-1)
        averages = self.averaged(weights, values)
        output = self.combine(averages)
        if self.layer.b_o is not None:
            output = output + self.layer.b_o
        return RowTape(self, queries, keys, values, weights, averages, output)

    def asked(self, flat: Float[Tensor, "p r q hk"]) -> Float[Tensor, "p r g m q k"]:
        """Queries, turned, by the group that shares keys and values."""
        found: Tensor = self.layer.turned(_heads(flat, self.layer.heads), self.at).unflatten(-3, (self.groups, -1))
        return found

    def tokens(self, flat: Float[Tensor, "p r n gkv"]) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of every group."""
        both = _heads(flat, self.groups)
        return self.layer.turned(both[..., : self.layer.key_width]), both[..., self.layer.key_width :].contiguous()

    def combine(self, averages: Float[Tensor, "p r g m q v"]) -> Float[Tensor, "p r q e"]:
        """Linear part of the output."""
        flat = _flat(averages.flatten(-4, -3))
        return flat if self.w_out is None else product(flat, self.w_out)

    def times(self, rows: Float[Tensor, "p #r g m q k"], tokens: Float[Tensor, "p #r g n k"]) -> Tensor:
        """Product of every row with every token of its group, (p, r, g, m, q, n)."""
        found: Tensor = (rows.flatten(-3, -2) @ tokens.mT).unflatten(-2, rows.shape[-3:-1])
        return found

    def averaged(self, weights: Float[Tensor, "p #r g m q n"], tokens: Float[Tensor, "p #r g n v"]) -> Tensor:
        """Sum of the tokens of the group with these weights, (p, r, g, m, q, v)."""
        found: Tensor = (weights.flatten(-3, -2) @ tokens).unflatten(-2, weights.shape[-3:-1])
        return found

    def gathered(self, weights: Float[Tensor, "p #r g m q n"], rows: Float[Tensor, "p #r g m q k"]) -> Tensor:
        """Adjoint of ``averaged`` in the tokens, (p, r, g, n, k)."""
        return weights.flatten(-3, -2).mT @ rows.flatten(-3, -2)

    def uncombine(self, cotangent: Float[Tensor, "p r q e"]) -> Float[Tensor, "p r g m q v"]:
        """Adjoint of ``combine``."""
        flat = cotangent if self.w_out is None else product(cotangent, self.w_out.mT)
        found: Tensor = _heads(flat, self.layer.heads).unflatten(-3, (self.groups, -1))
        return found


@dataclass(frozen=True, eq=False)
class RowTape:
    """The intermediate values of one evaluation, with the two derivative products; see ``AttentionTape``."""

    layer: PreparedRows
    queries: Float[Tensor, "p r g m q k"]
    keys: Float[Tensor, "p r g n k"]
    values: Float[Tensor, "p r g n v"]
    weights: Float[Tensor, "p r g m q n"]
    averages: Float[Tensor, "p r g m q v"]
    output: Float[Tensor, "p r q e"]

    def pullback(self, cotangent: Float[Tensor, "p r q e"]) -> Float[Tensor, "p r n d"]:
        """``J^T u`` for every stacked input."""
        rows, layer = self.layer, self.layer.layer
        g = rows.uncombine(cotangent)
        score = rows.times(g, self.values) - (g * self.averages).sum(dim=-1, keepdim=True)
        score = score * self.weights
        query = layer.turned_back(rows.averaged(score, self.keys).flatten(-4, -3), rows.at)
        key = layer.turned_back(rows.gathered(score, self.queries))
        value = rows.gathered(self.weights, g)
        back = product(_flat(torch.cat([key, value], dim=-1)), rows.w_kv.mT)
        return back.index_add(-2, rows.at, product(_flat(query), rows.w_q.mT))

    def pushforward(self, tangent: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r q e"]:
        """``J v`` for every stacked input."""
        rows = self.layer
        query = rows.asked(product(tangent[..., rows.at, :], rows.w_q))
        key, value = rows.tokens(product(tangent, rows.w_kv))
        score = rows.times(query, self.keys) + rows.times(self.queries, key)
        score = (score - (self.weights * score).sum(dim=-1, keepdim=True)) * self.weights
        return rows.combine(rows.averaged(score, self.values) + rows.averaged(self.weights, value))


def _joined(layer: Attention) -> Float[Tensor, "h kv"]:
    """Biases of keys and values side by side, 0 where there are none."""
    h, k, v = layer.heads, layer.key_width, layer.value_width
    given = ((layer.b_k, k), (layer.b_v, v))
    return torch.cat([layer.w_k.new_zeros(h, width) if bias is None else bias for bias, width in given], dim=-1)


def _heads(flat: Float[Tensor, "p r n hk"], heads: int) -> Float[Tensor, "p r h n k"]:
    found: Tensor = flat.unflatten(-1, (heads, -1)).transpose(-3, -2).contiguous()
    return found


def _flat(heads: Float[Tensor, "p r h n k"]) -> Float[Tensor, "p r n hk"]:
    return heads.transpose(-3, -2).flatten(-2)
