"""The softmax rows of one attention layer at one clean input: what no threat, goal or radius changes."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.shared.head_sizes import without_common_part
from attnrobust.certify.shared.pair_forms import gauge, key_gradient_norms, largest_form_norm
from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention


@dataclass(frozen=True, eq=False)
class SoftmaxRows:
    """Row (h, i) of head h and query i; token index j. Everything is computed once, when it is first asked for.

    The logit of j changes by ``beta_i.delta_j + delta_i.alpha_j + delta_i A delta_j`` with ``beta_i = s w_k q_i``,
    ``alpha_j = s w_q k_j``, ``A = s w_q w_k^T``, s the score factor; biases enter through q_i alone, as what is common
    to all keys of a row cancels. With rotary positions beta, alpha and A depend on the pair (i, j), and key biases
    stay (docs/rotary-certificates.md): ``beta_ij = w_k (s q_i R_i) R_j^T``, ``alpha_ij = w_q (s k_j R_j) R_i^T``.

    Args:
        layer: The attention layer.
        points: Clean tokens.
        mass: Masses or None.
        at: The rows i that are asked for, q of them; None: all. Arrays are then (h, q, n), with h q n numbers.
    """

    layer: Attention
    points: Float[Tensor, "n d"]
    mass: Float[Tensor, "n"] | None
    at: Int[Tensor, "q"] | None = None

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.points.shape[0])

    @cached_property
    def asked(self) -> Int[Tensor, "q"]:
        """The rows that are there, as tokens."""
        return torch.arange(self.n, device=self.points.device) if self.at is None else self.at

    @cached_property
    def log_weight(self) -> Float[Tensor, "h q n"]:
        """Log w; -inf where a token is hidden."""
        return torch.log_softmax(self.layer.scores(self.points, self.mass, at=self.at), dim=-1)

    @cached_property
    def weight(self) -> Float[Tensor, "h q n"]:
        """W."""
        return self.log_weight.exp()

    @cached_property
    def queries(self) -> Float[Tensor, "h q k"]:
        """``s q_i``, turned by rotary positions."""
        return self.layer.factor * self.layer.queries(self.points, at=self.at)

    @cached_property
    def keys(self) -> Float[Tensor, "h n k"]:
        """``s k_j``, turned by rotary positions, minus the head's shortest one; without the bias where it cancels."""
        if self.layer.rotary is not None:
            return without_common_part(self.layer.factor * self.layer.keys(self.points))
        return without_common_part(self.layer.factor * torch.einsum("nd,hdk->hnk", self.points, self.layer.w_k))

    @cached_property
    def beta(self) -> Float[Tensor, "h q d"]:
        """Gradient of score s_ij in the key token x_j, the same for all j; with rotary positions that of s_ii."""
        return torch.einsum("hnk,hdk->hnd", self.layer.turned_back(self.queries, self.at), self.layer.w_k)

    @cached_property
    def beta_norm(self) -> Float[Tensor, "h q"]:
        """``|beta_i|``, or ``|beta_ii|``."""
        norms: Tensor = torch.linalg.vector_norm(self.beta, dim=-1)
        return norms

    @cached_property
    def pair_norm(self) -> Float[Tensor, "h q m"]:
        """``|beta_ij|`` for every key j; m = 1 where they are all the same."""
        if self.layer.rotary is None:
            return self.beta_norm[..., None]
        return key_gradient_norms(self.layer, self.queries, self.n)

    @cached_property
    def alpha(self) -> Float[Tensor, "h n d"]:
        """Gradient of score s_ij in the query token x_i, minus the head's shortest one.

        Raises:
            UnsupportedModelError: Rotary positions: it differs from query to query.
        """
        if self.layer.rotary is not None:
            raise UnsupportedModelError("with rotary positions the gradient in the query depends on both positions")
        return without_common_part(torch.einsum("hnk,hdk->hnd", self.keys, self.layer.w_q))

    @cached_property
    def form_norm(self) -> Float[Tensor, "h"]:
        """Rotary positions: upper bound of every ``||A_ij||_2``."""
        return largest_form_norm(self.layer, self.n, at=self.at)

    @cached_property
    def gauge(self) -> Float[Tensor, "h k"]:
        """Rotary positions: the diagonal G, see ``pair_forms.gauge``."""
        return gauge(self.layer)


def own_share(
    weight: Float[Tensor, "h q n"], movable: Float[Tensor, "n"], at: Int[Tensor, "q"] | None = None
) -> Float[Tensor, "h q n"]:
    """``[j = i] - w_ii``: share of the query token itself in ``delta_j - dbar``; 0 where it may not move."""
    moves = movable if at is None else movable[at]
    return (own_entries(weight, at) - own_values(weight, at)[..., None]) * moves[:, None]


def own_entries(weight: Float[Tensor, "h q n"], at: Int[Tensor, "q"] | None) -> Float[Tensor, "q n"]:
    """``[j = i]`` for the rows i of ``at``, or for all."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return eye if at is None else eye[at]


def own_values(pairs: Float[Tensor, "*b q n"], at: Int[Tensor, "q"] | None) -> Float[Tensor, "*b q"]:
    """The entries j = i of the rows i of ``at``, or of all."""
    if at is None:
        return pairs.diagonal(dim1=-2, dim2=-1)
    return pairs.gather(-1, at[:, None].expand(*pairs.shape[:-1], 1))[..., 0]
