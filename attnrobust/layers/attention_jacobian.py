"""The derivative of attention at given tokens in closed form, as products; no autograd graph, no (n d) x (n d) matrix."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.linear_map import LinearMap, pool_rows, scale_tokens, select_tokens


@dataclass(frozen=True, eq=False)
class AttentionJacobian:
    """``J = D_X f`` at ``points`` by products.

    With ``dq = V w_q``, ``dk = V w_k``, ``dv = V w_v`` and ``ds_ij = scale (<dq_i, k_j> + <q_i, dk_j>)``:
    ``(J V)_i = sum_h [ sum_j P_ij dv_j + sum_j P_ij (ds_ij - sum_l P_il ds_il) v_j ] w_o``.
    Masks and masses enter through P alone; b_v, b_o and b_k drop out of the derivative.

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
        """Keys without bias (it cancels), times the score factor."""
        return self.attention.factor * torch.einsum("...nd,hdk->...hnk", self.points, self.attention.w_k)

    @cached_property
    def values(self) -> Float[Tensor, "*b h n v"]:
        """Values without bias (it cancels)."""
        return torch.einsum("...nd,hdv->...hnv", self.points, self.attention.w_v)

    @cached_property
    def averages(self) -> Float[Tensor, "*b h n v"]:
        """Head averages ``o_i = sum_j P_ij v_j`` of the values without bias."""
        return self.weights @ self.values

    @torch.no_grad()
    def matvec(self, v: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n e"]:
        """``J v``: the change of the output per unit move of the tokens along ``v``."""
        layer, weights = self.attention, self.weights
        scores = torch.einsum("...nd,hdk->...hnk", v, layer.w_q) @ self.keys.transpose(-1, -2)
        scores = scores + self.queries @ torch.einsum("...nd,hdk->...hkn", v, layer.w_k)
        change = weights * (scores - (weights * scores).sum(dim=-1, keepdim=True))
        heads = weights @ torch.einsum("...nd,hdv->...hnv", v, layer.w_v) + change @ self.values
        return layer.combine(heads)

    @torch.no_grad()
    def rmatvec(self, u: Float[Tensor, "*b n e"]) -> Float[Tensor, "*b n d"]:
        """``J^T u``: the gradient of ``<u, f(X)>``."""
        layer, weights = self.attention, self.weights
        heads = _split(layer, u)
        along = heads @ self.values.transpose(-1, -2)
        change = weights * (along - (weights * along).sum(dim=-1, keepdim=True))
        out = torch.einsum("...hnk,hdk->...nd", change @ self.keys, layer.w_q)
        out = out + torch.einsum("...hnk,hdk->...nd", change.transpose(-1, -2) @ self.queries, layer.w_k)
        return out + torch.einsum("...hnv,hdv->...nd", weights.transpose(-1, -2) @ heads, layer.w_v)

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


def _split(layer: Attention, u: Tensor) -> Tensor:
    """Transpose of ``Attention.combine``: (*b, n, e) -> (*b, h, n, v)."""
    if layer.w_o is not None:
        return torch.einsum("...ne,hve->...hnv", u, layer.w_o)
    return u.unflatten(-1, (layer.heads, layer.value_width)).transpose(-3, -2)
