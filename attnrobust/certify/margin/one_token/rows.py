"""Clean quantities of a few candidate moving tokens, in the coordinates in which their softmax rows move."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.margin.quadratic_form import FunctionalRows, token_values
from attnrobust.certify.margin.rows import MarginRows
from attnrobust.numerics.rounding import FORMULA, SMALLEST_UNIT, nonzero, outward
from attnrobust.numerics.triangle import triangle

SMALLEST_LENGTH = 1e-14  # added to every |l_j|: absolute rounding of a difference of keys


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows as functions of one moving token l; axes (h, l, j) for its own row, (h, i, l) for all other rows.

    A move delta enters head h only through ``y = (delta w_k, delta w_q, delta.gamma)`` (2k + 1 numbers): the logit
    change of foreign row i is ``a_i = s q_i.(delta w_k)``, that of the own row (its linear part)
    ``l_j.delta = own_j s q_l.(delta w_k) + s (k_j - mean k).(delta w_q)``. With rotary positions ``q_i R_i R_l^T`` and
    ``(k_j R_j - mean) R_l^T`` stand there.

    Args:
        rows: Clean rows of the whole input, every token movable.
        tokens: The candidates l.
    """

    rows: MarginRows
    tokens: Int[Tensor, "l"]

    @cached_property
    def place(self) -> Int[Tensor, "l"]:
        """0, 1, ...: pairs with ``tokens`` to pick the own entry."""
        return torch.arange(self.tokens.numel(), device=self.tokens.device)

    @cached_property
    def own(self) -> Float[Tensor, "h l n"]:
        """``[j = l] - w_l``: by how much ``delta_j - dbar`` is a multiple of delta."""
        out = -self.self_weight[..., None].expand_as(self.log_weight).clone()
        out[:, self.place, self.tokens] += 1.0
        return out

    @cached_property
    def log_weight(self) -> Float[Tensor, "h l n"]:
        """Logarithm of the own row's weights."""
        return self.rows.log_weight[:, self.tokens]

    @cached_property
    def weight(self) -> Float[Tensor, "h l n"]:
        """The own row's weights."""
        return self.rows.weight[:, self.tokens]

    @cached_property
    def self_weight(self) -> Float[Tensor, "h l"]:
        """w_ll."""
        return self.rows.weight[:, self.tokens, self.tokens]

    @cached_property
    def direction(self) -> Float[Tensor, "h l n y"]:
        """l_j in the coordinates (delta w_k, delta w_q)."""
        rows = self.rows
        key = self.own[..., None] * rows.layer.turned_back(rows.queries)[:, self.tokens, None, :]
        mean = (self.weight @ rows.keys)[:, :, None, :]
        query = (rows.keys[:, None] - mean).expand(*key.shape)
        return torch.cat([key, self.turned_back(query.transpose(1, 2)).transpose(1, 2)], dim=-1)

    def turned_back(self, vectors: Float[Tensor, "*b l k"]) -> Float[Tensor, "*b l k"]:
        """Vectors for every candidate l times the transpose of ``R_l``; as they are without rotary positions."""
        return self.rows.layer.turned_back(vectors, self.tokens)

    @cached_property
    def pair_norm(self) -> Float[Tensor, "h n _"]:
        """``|beta_il|``; last axis 1 where it is the same for all l."""
        norms = self.rows.pair_norm
        return norms if norms.shape[-1] != self.rows.n or self.rows.layer.rotary is None else norms[..., self.tokens]

    @cached_property
    def triangle(self) -> Float[Tensor, "h r y"]:
        """R of ``[w_k w_q] = Q R``: ``|l_j| = |R y_j|``."""
        layer = self.rows.layer
        return triangle(torch.cat([layer.w_k, layer.w_q], dim=-1))

    @cached_property
    def norm(self) -> Float[Tensor, "h l n"]:
        """Upper bound of ``|l_j|``."""
        image = self.direction @ self.triangle.mT[:, None]
        length: Tensor = torch.linalg.vector_norm(image, dim=-1)
        return outward(length, FORMULA) + SMALLEST_LENGTH

    @cached_property
    def log_complement(self) -> Float[Tensor, "h n l"]:
        """``log(1 - w_il)``, exact to rounding also near w = 1, where it is the sum of the other weights."""
        log_weight = self.rows.log_weight
        top = log_weight.argmax(-1, keepdim=True)
        others = torch.logsumexp(log_weight.scatter(-1, top, -torch.inf), dim=-1, keepdim=True)
        plain = torch.log1p(-log_weight[..., self.tokens].exp().clamp_max(0.75))
        return torch.where(top == self.tokens, others, plain)

    @cached_property
    def logit(self) -> Float[Tensor, "h n l"]:
        """``log w_il - log(1 - w_il)``."""
        return self.rows.log_weight[..., self.tokens] - self.log_complement

    @cached_property
    def slope(self) -> Float[Tensor, "h n l"]:
        """``w_il (1 - w_il)``."""
        return (self.rows.log_weight[..., self.tokens] + self.log_complement).exp()


@dataclass(frozen=True, eq=False)
class TokenFunctional:
    """One functional at the candidate tokens.

    Args:
        token: Class-independent quantities.
        functional: The functional's rows.
    """

    token: TokenRows
    functional: FunctionalRows

    @cached_property
    def pooling(self) -> Float[Tensor, "n l"]:
        """pi_i for foreign rows, 0 for the token's own row."""
        keep = torch.arange(self.functional.rows.n, device=self.token.tokens.device)[:, None] != self.token.tokens
        return self.functional.pooling[:, None] * keep

    @cached_property
    def own_pooling(self) -> Float[Tensor, "l"]:
        """pi_l."""
        return self.functional.pooling[self.token.tokens]

    @cached_property
    def advantage(self) -> Float[Tensor, "h l n"]:
        """Advantages v of the own row."""
        return self.functional.advantage[:, self.token.tokens]

    @cached_property
    def at_self(self) -> Float[Tensor, "l n"]:
        """1 where j = l."""
        return torch.nn.functional.one_hot(self.token.tokens, self.functional.rows.n).to(self.functional.advantage)

    @cached_property
    def rest_advantage(self) -> Float[Tensor, "h n l"]:
        """``vhat_il = (mean of z over the other tokens) - z_l``.

        It is ``v / (1 - w)``; for the heaviest token of a row, whose 1 - w may be tiny, a masked mean.
        """
        rows, tokens = self.functional.rows, self.token.tokens
        z = token_values(rows, self.functional.gamma)
        top = rows.log_weight.argmax(-1, keepdim=True)
        masked = rows.log_weight.scatter(-1, top, -torch.inf)
        alone = torch.isneginf(masked).all(-1, keepdim=True)
        mean = torch.softmax(masked.masked_fill(alone, 0.0), dim=-1) @ z[..., None]
        best = (mean - z[:, None, :][..., tokens]).masked_fill(alone, 0.0)
        plain = self.functional.advantage[..., tokens] / (1.0 - rows.weight[..., tokens].clamp_max(0.75))
        return torch.where(top == tokens, best, plain)

    @cached_property
    def basis(self) -> Float[Tensor, "h d m"]:
        """Columns ``[w_k, w_q, gamma]``: y = delta basis."""
        layer = self.functional.rows.layer
        return torch.cat([layer.w_k, layer.w_q, self.functional.gamma[..., None]], dim=-1)

    @cached_property
    def own_gradient(self) -> Float[Tensor, "h l m"]:
        """D of the own row, ``sum_j w_j v_j l_j - w_l gamma``, in the coordinates y."""
        weighted = self.token.weight * self.advantage
        logits = (weighted[..., None, :] @ self.token.direction)[..., 0, :]
        return torch.cat([logits, -self.token.self_weight[..., None]], dim=-1)

    @cached_property
    def own_gradient_norm(self) -> Float[Tensor, "h l"]:
        """``|D|``, kept away from 0; only the unit of a parameter."""
        dense = torch.einsum("hla,hda->hld", self.own_gradient, self.basis)
        length: Tensor = torch.linalg.vector_norm(dense, dim=-1)
        return nonzero(length, SMALLEST_UNIT)
