"""The quadratic majorant of the drop as a matrix-free symmetric operator on token moves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.rows import MarginRows
from attnrobust.certify.shared.head_sizes import without_common_part
from attnrobust.certify.shared.softmax_rows import own_values
from attnrobust.layers.heads import project
from attnrobust.numerics.rounding import SMALLEST_UNIT, nonzero

LARGEST = 1e130  # coefficients beyond (or NaN) say nothing, and their squares would overflow


@dataclass(frozen=True, eq=False)
class FunctionalRows:
    """What one margin functional adds to the clean rows.

    Args:
        rows: Shared clean quantities.
        pooling: Row weights pi of the rows that are there.
        gamma: ``w_v w_o c`` per head: value change ``t_j = gamma.delta_j``.
        advantage: ``v_j = E z - z_j``; its mean under w is 0.
    """

    rows: MarginRows
    pooling: Float[Tensor, "q"]
    gamma: Float[Tensor, "h d"]
    advantage: Float[Tensor, "h q n"]

    @cached_property
    def directions(self) -> Float[Tensor, "d gk"]:
        """Key maps and gamma of rows on their own side by side: one product with every token."""
        return torch.cat([self.rows.shared_keys, self.gamma.T], dim=1)

    @cached_property
    def weighted_advantage(self) -> Float[Tensor, "h q n"]:
        """``w_j v_j``."""
        return self.rows.weight * self.advantage

    @cached_property
    def value_norm(self) -> Float[Tensor, "h 1"]:
        """``|gamma|``, kept away from 0 for divisions in parameters."""
        norm: Tensor = torch.linalg.vector_norm(self.gamma, dim=-1, keepdim=True)
        return nonzero(norm, SMALLEST_UNIT)

    @cached_property
    def first_norm(self) -> Float[Tensor, "h q"]:
        """``|D_i|`` on the movable tokens; only the unit of a parameter, so its rounding does not matter.

        ``D_i = -w_i (x) gamma + (w v)_i (x) beta_i + e_i (x) sum_j w_j v_j alpha_j``.
        """
        rows = self.rows
        if rows.layer.rotary is not None:
            return self._first_norm_of_pairs
        wv, w, m = self.weighted_advantage, rows.weight, rows.movable
        gamma, beta = self.gamma[:, None], rows.beta
        cross = (gamma * beta).sum(-1)
        plain = (w**2 @ m) * (gamma**2).sum(-1) - 2.0 * ((w * wv) @ m) * cross + (wv**2 @ m) * (beta**2).sum(-1)
        block = -own_values(w, rows.at)[..., None] * gamma + own_values(wv, rows.at)[..., None] * beta
        change = ((block + wv @ rows.alpha) ** 2).sum(-1) - (block**2).sum(-1)
        return (plain + change * rows.own_movable).clamp_min(0.0).sqrt()

    @cached_property
    def _first_norm_of_pairs(self) -> Float[Tensor, "h q"]:
        """The same where block l of the key part is ``(w v)_il beta_il``."""
        rows, layer = self.rows, self.rows.layer
        wv, w, m = self.weighted_advantage, rows.weight, rows.movable
        along = layer.turned((self.gamma[:, None] @ layer.w_k).expand(-1, rows.n, -1))  # gamma w_k R_l
        cross = rows.queries @ along.mT
        plain = (w**2 @ m) * (self.gamma**2).sum(-1)[:, None] + ((wv * rows.pair_norm) ** 2 @ m)
        plain = plain - 2.0 * ((w * wv * cross) @ m)
        block = own_values(wv, rows.at)[..., None] * rows.beta
        block = block - own_values(w, rows.at)[..., None] * self.gamma[:, None]
        query = layer.turned_back(wv @ rows.keys, rows.at) @ layer.w_q.mT
        change = ((block + query) ** 2).sum(-1) - (block**2).sum(-1)
        return (plain + change * rows.own_movable).clamp_min(0.0).sqrt()

    @cached_property
    def gradient(self) -> Float[Tensor, "n d"]:
        """``G = sum_hi pi_i D_hi``: minus the gradient of the margin, on movable tokens."""
        return self.combined(self.pooling.expand(self.weighted_advantage.shape[:2]))

    def combined(self, factor: Float[Tensor, "h q"]) -> Float[Tensor, "n d"]:
        """``sum_hi factor_hi D_hi``, on movable tokens."""
        value = -(self.rows.weight.mT @ factor[..., None])[..., 0]
        return spread_back(self, factor[..., None] * self.weighted_advantage, value)

    def revalued(self, change: Float[Tensor, "h n"]) -> "FunctionalRows":
        """The rows if value j were larger by ``change_j``: v_j becomes ``v_j - change_j + mean_w change``."""
        mean = self.rows.weight @ change[..., None]
        return replace(self, advantage=self.advantage + mean - change[:, None])


def functional_rows(rows: MarginRows, pooling: Float[Tensor, "q"], functional: Float[Tensor, "e"]) -> FunctionalRows:
    """Specialise the clean rows to one functional of the pooled output."""
    gamma = rows.layer.value_output @ functional
    z = token_values(rows, gamma)
    advantage = (rows.weight @ z[..., None]) - z[:, None, :]
    return FunctionalRows(rows=rows, pooling=pooling, gamma=gamma, advantage=advantage)


def token_values(rows: MarginRows, gamma: Float[Tensor, "h d"]) -> Float[Tensor, "h n"]:
    """Z of every token up to a common shift of its head, which cancels in v as the value bias does."""
    z = torch.einsum("nd,hd->hn", rows.points, gamma)
    return without_common_part(z[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class LinearImages:
    """The linear pieces of one (batch of) token moves."""

    x: Float[Tensor, "*b h q n"]  # l_j.Delta
    t: Float[Tensor, "*b h n"]  # gamma.delta_j
    d: Float[Tensor, "*b h q"]  # D.Delta
    query: Float[Tensor, "*b h q k"]  # delta_i w_q, turned by rotary positions
    key: Float[Tensor, "*b g n k"]  # delta_j w_k, turned likewise; of rows on their own once for each shared key


def linear_images(functional: FunctionalRows, delta: Float[Tensor, "*b n d"]) -> LinearImages:
    """Evaluate the linear pieces; delta must vanish on tokens that may not move."""
    rows = functional.rows
    query, key, t = _projected(functional, delta)
    raw = with_keys(rows, rows.queries, key) + query @ rows.keys.mT
    x = raw - (rows.weight * raw).sum(-1, keepdim=True)
    d = (functional.weighted_advantage * x).sum(-1) - (rows.weight @ t[..., None])[..., 0]
    return LinearImages(x=x, t=t, d=d, query=query, key=key)


def _projected(functional: FunctionalRows, delta: Float[Tensor, "*b n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Moves of the queries of the rows and of all keys, turned by rotary positions, and of the values."""
    rows = functional.rows
    layer, k = rows.layer, rows.layer.key_width
    if rows.at is None:
        both = (delta @ rows.projection).unflatten(-1, (-1, 2 * k)).transpose(-3, -2)
        return layer.turned(both[..., :k]), layer.turned(both[..., k:]), (delta @ functional.gamma.T).mT
    key, value = (rows.tokens_of(delta) @ functional.directions).split((rows.shared_keys.shape[1], layer.heads), dim=-1)
    key = layer.turned(key.unflatten(-1, (-1, k)).transpose(-3, -2))
    return layer.turned(project(rows.asked_of(delta), rows.asked_map), rows.at), key, value.mT


def _unprojected(
    functional: FunctionalRows, query: Float[Tensor, "*b h q k"], key: Float[Tensor, "*b g n k"], t: Tensor
) -> Tensor:
    """Adjoint of ``_projected``, (*b, n, d)."""
    rows = functional.rows
    layer = rows.layer
    query, key = layer.turned_back(query, rows.at), layer.turned_back(key)
    if rows.at is None:
        back = torch.cat([query, key], dim=-1).transpose(-3, -2).flatten(-2) @ rows.projection.T
        return back + t.mT @ functional.gamma
    back = torch.cat([key.transpose(-3, -2).flatten(-2), t.mT], dim=-1) @ functional.directions.T
    own = query.transpose(-3, -2).flatten(-2) @ rows.asked_map.transpose(1, 2).flatten(0, 1)
    return rows.placed(back, own)


def with_keys(rows: MarginRows, left: Float[Tensor, "*a h q k"], key: Float[Tensor, "*b g n k"]) -> Tensor:
    """Products of vectors of the rows with the keys of their heads, (*b, h, q, n)."""
    if rows.sharing == 1:
        return left @ key.mT
    grouped = left.unflatten(-3, (-1, rows.sharing)).flatten(-3, -2)
    products: Tensor = (grouped @ key.mT).unflatten(-2, (rows.sharing, -1)).flatten(-4, -3)
    return products


def of_keys(rows: MarginRows, weight: Float[Tensor, "*a h q n"], key: Float[Tensor, "*b g n k"]) -> Tensor:
    """Sums of the keys of their heads with weights of the rows, (*b, h, q, k)."""
    if rows.sharing == 1:
        return weight @ key
    grouped = weight.unflatten(-3, (-1, rows.sharing)).flatten(-3, -2)
    sums: Tensor = (grouped @ key).unflatten(-2, (rows.sharing, -1)).flatten(-4, -3)
    return sums


def _into_keys(rows: MarginRows, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``sum_q weight_q^T vector_q`` of pairs of weights (*b, h, q, n) and vectors (*b, h, q, k), by shared key."""
    if rows.sharing == 1:
        return sum((weight.mT @ vector for weight, vector in pairs[1:]), start=pairs[0][0].mT @ pairs[0][1])
    joined = [_by_group(rows, [pair[side] for pair in pairs]) for side in (0, 1)]
    return joined[0].mT @ joined[1]


def _by_group(rows: MarginRows, parts: Sequence[Tensor]) -> Tensor:
    """Rows of the heads that share keys below each other, those of all parts."""
    most = max(part.ndim for part in parts)
    batch = next(part.shape[:-3] for part in parts if part.ndim == most)
    grouped = [part.unflatten(-3, (-1, rows.sharing)).flatten(-3, -2) for part in parts]
    return torch.cat([part.expand(*batch, *part.shape[-3:]) for part in grouped], dim=-2)


def spread_back(
    functional: FunctionalRows,
    x: Tensor,
    t: Tensor,
    *,
    query: Tensor | None = None,
    key: Sequence[tuple[Tensor, Tensor]] = (),
    more: Tensor | None = None,
) -> Float[Tensor, "*b n d"]:
    """Adjoint of ``linear_images`` for cotangents of (x, t, query, key), restricted to the movable tokens.

    That of the keys is ``sum_q weight_q^T vector_q`` of the pairs in ``key``, and ``more``.
    """
    rows = functional.rows
    raw = x - rows.weight * x.sum(-1, keepdim=True)
    to_query, to_key = raw @ rows.keys, _into_keys(rows, ((raw, rows.queries), *key))
    if query is not None:
        to_query = to_query + query
    if more is not None:
        to_key = to_key + more
    return _unprojected(functional, to_query, to_key, t) * rows.movable[:, None]


@dataclass(frozen=True, eq=False)
class QuadraticMajorant:
    """``Delta^T M Delta``; pooling weights are inside every coefficient.

    ``sum c x^2 - 2 sum b x t + sum e_j t_j^2 - sum m (E t)^2 + 2 sum pi E[qv] + sum g d^2 + sum a |A^T delta_i|^2
    + sum_ll' S_ll' delta_l.delta_l'``. With rotary positions N(delta_i) of docs/rotary-certificates.md stands for
    ``|A^T delta_i|^2``, and ``sum_h sum_ll' K_hll' y_l.y_l'`` with ``y_l = delta_l w_k R_l G^(-1/2)`` is added.

    Args:
        functional: The functional's rows.
        square: c, coefficient of x_j^2.
        mixed: b.
        value: e summed over rows.
        centre: m, coefficient of ``-(E t)^2`` per row.
        first: g, coefficient of d^2.
        bilinear: a, coefficient of ``|A^T delta_i|^2``.
        tokens: S, coefficient of ``|sum_j w_j v_j delta_j|^2`` summed over heads and rows; its diagonal where the
            rest is 0.
        gradient: Linear part of the whole bound ``constant + gradient.Delta + Delta M Delta / 2``.
        constant: Its constant part.
        keys: Rotary positions: K, coefficient of ``|sum_j w_j v_j y_j|^2`` summed over rows; else None.
    """

    functional: FunctionalRows
    square: Float[Tensor, "h q n"]
    mixed: Float[Tensor, "h q n"]
    value: Float[Tensor, "h n"]
    centre: Float[Tensor, "h q"]
    first: Float[Tensor, "h q"]
    bilinear: Float[Tensor, "h q"]
    tokens: "Float[Tensor, 'm m'] | Float[Tensor, 'm'] | Across"
    gradient: Float[Tensor, "m p"]
    constant: Float[Tensor, ""]
    keys: "Float[Tensor, 'h n n'] | Across | None" = None

    @property
    def size(self) -> int:
        """Length of a flattened token move."""
        return self.functional.rows.points.numel()

    def apply(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """``M Delta``, restricted to the movable tokens on both sides."""
        functional, rows = self.functional, self.functional.rows
        factor = rows.layer.factor
        delta = delta * rows.movable[:, None]
        piece = linear_images(functional, delta)
        first = self.first * piece.d
        x = (
            self.square * piece.x
            - self.mixed * piece.t[..., None, :]
            + functional.weighted_advantage * first[..., None]
        )
        mean_t = self.centre * (rows.weight @ piece.t[..., None])[..., 0] + first
        t = self.value * piece.t - (self.mixed * piece.x).sum(-2) - (rows.weight.mT @ mean_t[..., None])[..., 0]
        pooled = factor * functional.pooling[:, None] * functional.weighted_advantage
        query = of_keys(rows, pooled, piece.key) + self.bilinear[..., None] * query_form(rows, piece.query)
        key, more = [(pooled, piece.query)], None
        if isinstance(self.keys, Across):
            key.append((self.keys.left, of_keys(rows, self.keys.right, piece.key) / rows.gauge[:, None]))
        elif self.keys is not None:
            more = self.keys @ (piece.key / rows.gauge[:, None])
        form = self.tokens
        tokens = form[:, None] * delta if isinstance(form, Tensor) and form.ndim == 1 else form @ delta
        moved = spread_back(functional, x, t, query=query, key=key, more=more)
        return moved + tokens * rows.movable[:, None]

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed, also not in products with moves."""
        parts = [self.square, self.mixed, self.value, self.centre, self.first, self.bilinear, self.gradient]
        for part in (self.constant, self.tokens, self.keys):
            parts += [part.left, part.right] if isinstance(part, Across) else [] if part is None else [part]
        return all(float(part.abs().amax()) < LARGEST for part in parts)

    def at(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """``constant + gradient.Delta + Delta M Delta / 2``."""
        return self.constant + (delta * (self.gradient + 0.5 * self.apply(delta))).sum((-2, -1))

    def flat(self, vector: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
        """``apply`` on flattened moves."""
        return self.apply(vector.reshape(*vector.shape[:-1], *self.functional.rows.points.shape)).flatten(-2)


@dataclass(frozen=True, eq=False)
class Across:
    """``left^T right`` as a map of tokens, for few rows: 2 q n numbers instead of n^2.

    Args:
        left: One row of coefficients of the tokens for each of the q rows.
        right: Likewise.
    """

    left: Float[Tensor, "*h q n"]
    right: Float[Tensor, "*h q n"]

    def __matmul__(self, tokens: Float[Tensor, "*b n k"]) -> Float[Tensor, "*b n k"]:
        return self.left.mT @ (self.right @ tokens)


def across(rows: MarginRows, left: Float[Tensor, "h q n"], right: Float[Tensor, "h q n"]) -> Tensor | Across:
    """``left_h^T right_h`` summed over heads, with rotary positions of each; factored for rows on their own."""
    if rows.layer.rotary is None:
        left, right = left.flatten(0, 1), right.flatten(0, 1)
    return left.mT @ right if rows.at is None else Across(left, right)


def query_form(rows: MarginRows, query: Float[Tensor, "*b h q k"]) -> Float[Tensor, "*b h q k"]:
    """``s^2 query w_k^T w_k``, whose product with query is ``|A^T delta_i|^2``; or ``s^2 query G``, N(delta_i)."""
    if rows.layer.rotary is not None:
        return query * (rows.layer.factor**2 * rows.gauge[:, None])
    return query @ rows.key_gram
