"""Forward, pullback and pushforward of an attention layer in closed form, for stacks of inputs."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.layers.features import features_of
from attnrobust.layers.token_map import TokenMap

FEATURES = frozenset({"bias", "out_projection", "scale", "mask", "causal", "window", "rotary", "head_bias"})
"""The features of attention layers that the closed forms of this folder evaluate."""


def covers(layer: TokenMap) -> TypeGuard[Attention]:
    """Whether the closed forms are the layer: exactly ``Attention``, without a feature that they do not know."""
    return type(layer) is Attention and features_of(layer) <= FEATURES


class PreparedAttention:
    """One layer with its projections fused into one matrix, for p inputs of n tokens.

    Args:
        layer: The layer.
        n: Token count.
        mass: Token masses (p, n), or None where they are equal.
    """

    def __init__(self, layer: Attention, n: int, mass: Float[Tensor, "p n"] | None) -> None:
        self.heads, self.key_width, self.value_width = layer.heads, layer.key_width, layer.value_width
        parts = (layer.factor * layer.w_q, layer.w_k, layer.w_v)
        self.w_in = torch.cat([columns(w) for w in parts], dim=1)
        biases = (None if layer.b_q is None else layer.factor * layer.b_q, layer.b_k, layer.b_v)
        self.b_in = torch.cat([_flat_bias(b, w) for b, w in zip(biases, parts, strict=True)])
        self.w_out = None if layer.w_o is None else layer.w_o.flatten(0, 1)
        self.b_out = layer.b_o
        bias = layer.score_bias(n, mass)  # (n, n) or (h, n, n), or (p, 1 or h, 1 or n, n) with masses
        self.score_bias = bias if bias is None or mass is None else bias[:, None]
        self.turned, self.turned_back = layer.turned, layer.turned_back

    def forward(self, x: Float[Tensor, "p r n d"]) -> "AttentionTape":
        """Evaluate the layer and keep what the derivatives need."""
        projected = product(x, self.w_in).add_(self.b_in)  # in place: memory traffic is what a step pays for
        queries, keys, values = self.split(projected)
        scores = queries @ keys.mT
        if self.score_bias is not None:
            scores = scores.add_(self.score_bias)
        weights = torch.softmax(scores, dim=-1)
        averages = weights @ values
        output = self.combine(averages)
        if self.b_out is not None:
            output = output + self.b_out
        return AttentionTape(self, queries, keys, values, weights, averages, output)

    def split(self, projected: Float[Tensor, "p r n m"]) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the fused projection into per-head queries, keys and values."""
        k, v = self.heads * self.key_width, self.heads * self.value_width
        queries, keys, values = projected.split((k, k, v), dim=-1)
        return self.turned(self._heads(queries)), self.turned(self._heads(keys)), self._heads(values)

    def _heads(self, flat: Float[Tensor, "p r n hk"]) -> Float[Tensor, "p r h n k"]:
        p, r, n, width = flat.shape
        return flat.view(p, r, n, self.heads, width // self.heads).transpose(-3, -2).contiguous()

    def combine(self, averages: Float[Tensor, "p r h n v"]) -> Float[Tensor, "p r n e"]:
        """Linear part of the output."""
        flat = averages.transpose(-3, -2).flatten(-2)
        return flat if self.w_out is None else product(flat, self.w_out)

    def uncombine(self, cotangent: Float[Tensor, "p r n e"]) -> Float[Tensor, "p r h n v"]:
        """Adjoint of ``combine``."""
        return self._heads(cotangent if self.w_out is None else product(cotangent, self.w_out.mT))


@dataclass(frozen=True, eq=False)
class AttentionTape:
    """The intermediate values of one evaluation, with the two derivative products.

    With ``o_i = sum_j P_ij v_j`` and scores ``s = q k^T``: a cotangent g of o gives ``dv = P^T g``,
    ``ds_ij = P_ij (g_i . v_j - g_i . o_i)``, ``dq = ds k``, ``dk = ds^T q``; a tangent gives
    ``dP_ij = P_ij (ds_ij - sum_l P_il ds_il)``.
    """

    layer: PreparedAttention
    queries: Float[Tensor, "p r h n k"]
    keys: Float[Tensor, "p r h n k"]
    values: Float[Tensor, "p r h n v"]
    weights: Float[Tensor, "p r h n n"]
    averages: Float[Tensor, "p r h n v"]
    output: Float[Tensor, "p r n e"]

    def pullback(self, cotangent: Float[Tensor, "p r n e"]) -> Float[Tensor, "p r n d"]:
        """``J^T u`` for every stacked input."""
        g = self.layer.uncombine(cotangent)
        score = g @ self.values.mT
        score = score.sub_((g * self.averages).sum(dim=-1, keepdim=True)).mul_(self.weights)
        back = self.layer.turned_back
        parts = (back(score @ self.keys), back(score.mT @ self.queries), self.weights.mT @ g)
        flat = torch.cat([part.transpose(-3, -2).flatten(-2) for part in parts], dim=-1)
        return product(flat, self.layer.w_in.mT)

    def pushforward(self, tangent: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r n e"]:
        """``J v`` for every stacked input."""
        dq, dk, dv = self.layer.split(product(tangent, self.layer.w_in))
        score = (dq @ self.keys.mT).add_(self.queries @ dk.mT)
        score = score.sub_((self.weights * score).sum(dim=-1, keepdim=True)).mul_(self.weights)
        return self.layer.combine(score @ self.values + self.weights @ dv)

    def query_pushforward(self, tangent: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r n e"]:
        """Derivative through every token's own query only: row i is ``Q_i v_i``."""
        dq, _, _ = self.layer.split(product(tangent, self.layer.w_in))
        score = dq @ self.keys.mT
        score = score.sub_((self.weights * score).sum(dim=-1, keepdim=True)).mul_(self.weights)
        return self.layer.combine(score @ self.values)

    def query_pullback(self, cotangent: Float[Tensor, "p r n e"]) -> Float[Tensor, "p r n d"]:
        """Adjoint of ``query_pushforward``."""
        g = self.layer.uncombine(cotangent)
        score = g @ self.values.mT
        score = score.sub_((g * self.averages).sum(dim=-1, keepdim=True)).mul_(self.weights)
        dq = self.layer.turned_back(score @ self.keys).transpose(-3, -2).flatten(-2)
        return product(dq, self.layer.w_in[:, : dq.shape[-1]].mT)


def _flat_bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0] * weight.shape[2]) if bias is None else bias.flatten()


def columns(weight: Float[Tensor, "h d k"]) -> Float[Tensor, "d hk"]:
    """The weights of all heads side by side."""
    return weight.transpose(0, 1).flatten(1)


def product(x: Float[Tensor, "p r n a"], matrix: Float[Tensor, "a b"]) -> Float[Tensor, "p r n b"]:
    """``x @ matrix`` as one product per problem: its bits do not depend on how many problems are stacked."""
    p, r, n, a = x.shape
    return torch.bmm(x.reshape(p, r * n, a), matrix.expand(p, -1, -1)).view(p, r, n, -1)
