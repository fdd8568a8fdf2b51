"""The derivative of attention at given tokens by closed-form products: no autograd graph, no (n d) x (n d) matrix."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.numerics.linear_map import LinearMap, pool_rows, scale_tokens, select_tokens


@dataclass(frozen=True, eq=False)
class AttentionJacobian:
    """``J = D_X f`` at ``points`` by products.

    With ``dq = V w_q``, ``dk = V w_k``, ``dv = V w_v`` and ``ds_ij = scale (<dq_i, k_j> + <q_i, dk_j>)``:
    ``(J V)_i = sum_h [ sum_j P_ij dv_j + sum_j P_ij (ds_ij - sum_l P_il ds_il) v_j ] w_o``.
    Masks, biases of positions and masses enter through P alone; b_v, b_o and, without rotary positions, b_k drop out of
    the derivative. Rotary positions turn q, k, dq and dk.

    Args:
        attention: The layer.
        points: Tokens (n, d), or a batch (*b, n, d) with one derivative each.
        mass: Token masses (*b, n) or None for equal ones.

    Raises:
        InputError: Attention weights that are not finite (the scores overflow), or a wrong width.
    """

    attention: Attention
    points: Float[Tensor, "*b n d"]
    mass: Float[Tensor, "*b n"] | None = None

    def __post_init__(self) -> None:
        if self.points.ndim < 2 or self.points.shape[-1] != self.attention.width:
            raise InputError(f"tokens must have shape (n, {self.attention.width}); got {tuple(self.points.shape)}")
        with torch.no_grad():
            points = self.points.detach().to(torch.float64)
            object.__setattr__(self, "points", points)
            weights = self.attention.weights(points, self.mass)
        if not bool(torch.isfinite(weights).all()):
            raise InputError("the attention weights are not finite at these tokens; the scores overflow")
        object.__setattr__(self, "_weights", weights)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return int(self.points.shape[-2])

    @property
    def weights(self) -> Float[Tensor, "*b h n n"]:
        """Attention weights P."""
        weights: Tensor = self._weights  # type: ignore[attr-defined]
        return weights

    @cached_property
    def queries(self) -> Float[Tensor, "*b h n k"]:
        """Queries with their bias, times the score factor."""
        return self.attention.factor * self.attention.queries(self.points)

    @cached_property
    def keys(self) -> Float[Tensor, "*b h n k"]:
        """Keys times the score factor; without their bias where it cancels (no rotary positions)."""
        if self.attention.rotary is not None:
            return self.attention.factor * self.attention.keys(self.points)
        return self.attention.factor * torch.einsum("...nd,hdk->...hnk", self.points, self.attention.w_k)

    @cached_property
    def values(self) -> Float[Tensor, "*b h n v"]:
        """Values without bias (it cancels)."""
        return torch.einsum("...nd,hdv->...hnv", self.points, self.attention.w_v)

    @cached_property
    def averages(self) -> Float[Tensor, "*b h n v"]:
        """Head averages ``o_i = sum_j P_ij v_j`` of the values without bias."""
        return self.weights @ self.values

    @cached_property
    def _into(self) -> Float[Tensor, "d m"]:
        """All input projections of all heads side by side."""
        layer = self.attention
        return torch.cat([w.transpose(0, 1).flatten(1) for w in (layer.w_q, layer.w_k, layer.w_v)], dim=1)

    @torch.no_grad()
    def matvec(self, v: Float[Tensor, "... n d"]) -> Float[Tensor, "... n e"]:
        """``J v``: the change of the output per unit move of the tokens along ``v``."""
        layer, weights = self.attention, self.weights
        v = v.expand(*torch.broadcast_shapes(v.shape[:-2], self.points.shape[:-2]), *v.shape[-2:])
        widths = [layer.heads * layer.key_width, layer.heads * layer.key_width, layer.heads * layer.value_width]
        dq, dk, dv = (to_heads(part, layer.heads) for part in (v @ self._into).split(widths, dim=-1))
        dq, dk = layer.turned(dq), layer.turned(dk)
        queries, keys = self.queries.expand_as(dq), self.keys.expand_as(dk)
        scores = torch.cat([dq, queries], dim=-1) @ torch.cat([keys, dk], dim=-1).transpose(-1, -2)
        change = _centred(scores, weights)
        return layer.combine(weights @ dv + change @ self.values)

    @torch.no_grad()
    def rmatvec(self, u: Float[Tensor, "... n e"]) -> Float[Tensor, "... n d"]:
        """``J^T u``: the gradient of ``<u, f(X)>``."""
        layer, weights = self.attention, self.weights
        heads = _split(layer, u)
        change = _centred(heads @ self.values.transpose(-1, -2), weights)
        dq = layer.turned_back(change @ self.keys)
        dk = layer.turned_back(change.transpose(-1, -2) @ self.queries)
        dv = weights.transpose(-1, -2) @ heads
        return torch.cat([from_heads(part) for part in (dq, dk, dv)], dim=-1) @ self._into.T

    def linear_map(
        self,
        *,
        pool: Float[Tensor, "n"] | None = None,
        movable: Bool[Tensor, "n"] | None = None,
        token_scale: Float[Tensor, "n"] | None = None,
    ) -> LinearMap:
        """The derivative as a map, pooled and restricted.

        Args:
            pool: Row weights pi: the output becomes ``sum_i pi_i (J v)_i`` of shape (e,); None keeps all rows (n, e).
            movable: Tokens that may move: the input becomes (m, d).
            token_scale: Factor on each token's move, applied before the restriction, (n,).

        Raises:
            InputError: The tokens are a batch.
        """
        if self.points.ndim != 2:
            raise InputError("a linear map needs one input (n, d), not a batch")
        linear = LinearMap(
            matvec=self.matvec, rmatvec=self.rmatvec, in_shape=(self.n, self.attention.width),
            out_shape=(self.n, self.attention.out_width), device=self.attention.device,
        )  # fmt: skip
        linear = pool_rows(linear, pool)
        if token_scale is not None:
            linear = scale_tokens(linear, token_scale)
        return linear if movable is None else select_tokens(linear, movable)


def value_map(jacobian: AttentionJacobian) -> LinearMap:
    """``V -> sum_h P_h V w_v^h w_o^h`` with the attention weights held fixed: the part of J that moves the values."""
    layer, weights = jacobian.attention, jacobian.weights

    def matvec(v: Tensor) -> Tensor:
        return layer.combine(weights @ torch.einsum("...nd,hdv->...hnv", v, layer.w_v))

    def rmatvec(u: Tensor) -> Tensor:
        return torch.einsum("...hnv,hdv->...nd", weights.transpose(-1, -2) @ _split(layer, u), layer.w_v)

    shapes = (jacobian.n, layer.width), (jacobian.n, layer.out_width)
    return LinearMap(matvec, rmatvec, in_shape=shapes[0], out_shape=shapes[1], device=layer.device)


def _centred(scores: Tensor, weights: Tensor) -> Tensor:
    """``P_ij (s_ij - sum_l P_il s_il)``, in the memory of ``scores``."""
    mean = torch.linalg.vecdot(weights, scores, dim=-1)
    return scores.sub_(mean[..., None]).mul_(weights)


def to_heads(flat: Tensor, heads: int) -> Tensor:
    """(*b, n, h w) -> (*b, h, n, w), contiguous: batched products are several times faster then."""
    return flat.reshape(*flat.shape[:-1], heads, -1).transpose(-3, -2).contiguous()


def from_heads(per_head: Tensor) -> Tensor:
    """(*b, h, n, w) -> (*b, n, h w)."""
    return per_head.transpose(-3, -2).flatten(-2)


def _split(layer: Attention, u: Tensor) -> Tensor:
    """Transpose of ``Attention.combine``: (*b, n, e) -> (*b, h, n, v)."""
    return to_heads(u if layer.w_o is None else u @ layer.w_o.flatten(0, 1).T, layer.heads)
