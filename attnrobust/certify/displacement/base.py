"""Displacement certificate: everything at the clean input that does not depend on the radius.

Notation of docs/displacement-certificate.md: row-heads g = (h, i), weights w, deviations vh_j = v_j - E v, logit part
``l_j = b.(delta_j - dbar) + W_q^T delta_i . (k_j - E k)`` linear in the move, ``q_j = delta_i A (delta_j - dbar)``.
With rotary positions b, A and k depend on the pair of tokens (docs/rotary-certificates.md).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.displacement.pair_rows import pulled_keys, query_covariances, query_distances
from attnrobust.certify.shared.head_sizes import without_common_part
from attnrobust.certify.shared.softmax_rows import SoftmaxRows, own_share
from attnrobust.numerics.rounding import CANCELLATION, SMALLEST_UNIT, nonzero, outward
from attnrobust.numerics.triangle import triangle

TOGETHER = 2**18  # numbers of the (n, n, n) arrays of some heads that are made at once
GRAM_LIMIT = 128  # up to this n the (h, n, n, n) arrays are built: 12 heads at 128 tokens are 200 MB


@dataclass(frozen=True, eq=False)
class ValueRows(SoftmaxRows):
    """Softmax rows with values moved behind the output projection; what depends on no movable tokens.

    With ``w_o^h = L_h U_h`` (orthonormal rows U_h) the values are ``v L_h`` and a stack z of head vectors changes the
    output by at most ``mixing * ||z||``, ``mixing = ||[U_1; ...; U_H]||_2`` (1 without output projection).
    """

    @cached_property
    def _split_output(self) -> tuple[Tensor, float]:
        if self.layer.w_o is None:
            eye = torch.eye(self.layer.value_width, dtype=self.weight.dtype, device=self.weight.device)
            return eye.expand(self.layer.heads, -1, -1), 1.0
        basis, triangle = torch.linalg.qr(self.layer.w_o.transpose(-1, -2))  # w_o = triangle^T basis^T
        stacked = basis.transpose(-1, -2).flatten(0, 1)
        return triangle.transpose(-1, -2), float(torch.linalg.matrix_norm(stacked, 2))

    @property
    def inner(self) -> Float[Tensor, "h v r"]:
        """``L_h``: the inner part of the output projection."""
        return self._split_output[0]

    @cached_property
    def w_v(self) -> Float[Tensor, "h d r"]:
        """Value weights behind the inner part of the output projection."""
        return self.layer.w_v @ self.inner

    @property
    def mixing(self) -> float:
        """Norm of the map from stacked head vectors to the output."""
        return self._split_output[1]

    @cached_property
    def values(self) -> Float[Tensor, "h n v"]:
        """Values without bias, shifted (any common shift cancels in every row)."""
        return without_common_part(torch.einsum("nd,hdv->hnv", self.points, self.w_v))

    @cached_property
    def averages(self) -> Float[Tensor, "h n v"]:
        """Row averages of the shifted values."""
        return self.weight @ self.values

    @cached_property
    def spread(self) -> Float[Tensor, "h n n"]:
        """``|v_j - E v|`` per row-head, rounded outward."""
        return _distances(self.values, self.averages)

    @cached_property
    def query_factor(self) -> Float[Tensor, "h r k"]:
        """R with ``|R x| = |W_q x|``."""
        return triangle(self.layer.w_q)

    @cached_property
    def centred_keys(self) -> tuple[Tensor, Tensor]:
        """``R k_j`` and ``R E k`` per row: the query part of l_j has the coefficient of norm ``|R (k_j - E k)|``."""
        rotated = self.keys @ self.query_factor.transpose(-1, -2)
        return rotated, self.weight @ rotated

    @cached_property
    def query_distance(self) -> Float[Tensor, "h n n"]:
        """``|W_q (k_j - E k)|`` per row, the norm of the query part of l_j, rounded outward."""
        if self.layer.rotary is not None:
            return outward(query_distances(self, self.query_factor), CANCELLATION)
        return _distances(*self.centred_keys)

    @cached_property
    def cross(self) -> Float[Tensor, "h n n"]:
        """``b_i . W_q (k_j - E k)``; with rotary positions ``b_ii . W_q (k_j R_j - mean) R_i^T``."""
        pulled = self.layer.turned(torch.einsum("hid,hdk->hik", self.beta, self.layer.w_q))
        scores = pulled @ self.keys.transpose(-1, -2)
        return scores - (self.weight * scores).sum(dim=-1, keepdim=True)

    @cached_property
    def value_norms(self) -> Float[Tensor, "h"]:
        """``||W_v||_2`` per head."""
        norms: Tensor = torch.linalg.matrix_norm(self.w_v, 2)
        return norms

    @cached_property
    def bilinear_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per head ``A = W_q W_k^T factor = left diag(s) right^T``: left (h, d, r), s (h, r), right (h, d, r)."""
        q_basis, q_tri = torch.linalg.qr(self.layer.w_q)
        k_basis, k_tri = torch.linalg.qr(self.layer.w_k)
        left, values, right = torch.linalg.svd(abs(self.layer.factor) * q_tri @ k_tri.transpose(-1, -2))
        return q_basis @ left, values, k_basis @ right.transpose(-1, -2)

    @cached_property
    def bilinear_norms(self) -> Float[Tensor, "h"]:
        """``||A||_2`` per head; with rotary positions a bound of every ``||A_ij||_2``."""
        return self.bilinear_factors[1][:, 0] if self.layer.rotary is None else self.form_norm

    @cached_property
    def query_scale(self) -> Float[Tensor, "h r"]:
        """Factors c with ``|A^T delta|^2 = sum_r c_r (left^T delta)_r^2``, or N(delta) with rotary positions."""
        if self.layer.rotary is None:
            return self.bilinear_factors[1]
        left = torch.linalg.matrix_norm(self.balanced_factors[0], 2)
        return (self._gauge_norm / nonzero(left)).square()[:, None].expand_as(self.gauge)

    @cached_property
    def _gauge_norm(self) -> Float[Tensor, "h"]:
        """Rotary positions: ``|s| ||W_q G^(1/2)||``, so that N(delta) is at most its square times ``|delta|^2``."""
        norms: Tensor = torch.linalg.matrix_norm(self.layer.w_q * self.gauge.sqrt()[:, None], 2)
        return abs(self.layer.factor) * norms

    @cached_property
    def balanced_factors(self) -> tuple[Tensor, Tensor]:
        """``A = left right^T`` per head with equal singular values on both sides: (h, d, r) each.

        With rotary positions ``c |s| W_q G^(1/2)`` and ``W_k G^(-1/2) / c``, c so that their norms are equal.
        """
        if self.layer.rotary is not None:
            root = self.gauge.sqrt()[:, None]
            left, right = abs(self.layer.factor) * self.layer.w_q * root, self.layer.w_k / root
            sizes = [nonzero(torch.linalg.matrix_norm(part, 2), SMALLEST_UNIT) for part in (left, right)]
            balance = (sizes[1] / sizes[0]).sqrt()[:, None, None]
            return left * balance, right / balance
        left, values, right = self.bilinear_factors
        root = values.sqrt()[:, None]
        return left * root, right * root

    @cached_property
    def plain_values(self) -> Float[Tensor, "h n v"]:
        """Values before the output projection, without bias, shifted."""
        return without_common_part(torch.einsum("nd,hdv->hnv", self.points, self.layer.w_v))

    @cached_property
    def value_gram(self) -> Float[Tensor, "h v v"]:
        """G with ``|gamma|^2 = dv^T G dv`` behind the output projection."""
        return self.inner @ self.inner.mT

    @cached_property
    def into_heads(self) -> tuple[Float[Tensor, "d m"], list[int]]:
        """``[W_q, W_k, W_v, left, right]`` of all heads side by side, and the widths of the five parts."""
        layer = self.layer
        parts = (layer.w_q, layer.w_k, layer.w_v, *self.balanced_factors)
        wide = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        return wide, [layer.heads * part.shape[-1] for part in parts]

    @cached_property
    def projection_gram(self) -> Float[Tensor, "h m m"]:
        """``W^T W`` of ``W = [W_q, W_k, W_v]``: what a back-projected move is in the projections of its own head."""
        stacked = torch.cat([self.layer.w_q, self.layer.w_k, self.layer.w_v], dim=-1)
        return stacked.mT @ stacked


@dataclass(frozen=True, eq=False)
class MovingRows:
    """The rows of one question: which tokens move, and which rows count.

    Several questions at one input share ``clean``, and with it the work that does not depend on what moves.

    Args:
        clean: The clean rows.
        row_weights: Pooling weights or None (every row counts).
        movable: Tokens that move.
    """

    clean: ValueRows
    row_weights: Float[Tensor, "n"] | None
    movable: Bool[Tensor, "n"]

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.clean.n

    @cached_property
    def single(self) -> int | None:
        """The only token that moves, or None where there are several."""
        moving = self.movable.nonzero().flatten().tolist()
        return moving[0] if len(moving) == 1 else None

    @cached_property
    def moves(self) -> Float[Tensor, "n"]:
        """1 for tokens that move, else 0."""
        return self.movable.to(self.clean.points)

    @property
    def separate(self) -> bool:
        """Whether the counted output is a stack of head vectors, so that shrinking one of them shrinks its norm."""
        one_row = self.row_weights is None or int((self.row_weights != 0).sum()) == 1
        return self.clean.layer.w_o is None and one_row

    @cached_property
    def weight_energy(self) -> Float[Tensor, "h n 1"]:
        """``sum over movable l of w_l^2``."""
        return (self.clean.weight.square() * self.moves).sum(dim=-1, keepdim=True)

    @cached_property
    def pair_energy(self) -> Float[Tensor, "h n 1"]:
        """Rotary positions: ``sum over movable l of w_l^2 |b_il|^2``."""
        weighted = self.clean.weight * self.clean.pair_norm
        return (weighted.square() * self.moves).sum(dim=-1, keepdim=True)

    @cached_property
    def key_reach(self) -> Float[Tensor, "h n n"]:
        """Square of the norm of the key part of l_j: ``|b_i|^2 contrast^2``, |b_il| inside with rotary positions."""
        if self.clean.layer.rotary is None:
            return self.clean.beta_norm[..., None].square() * self.contrast.square()
        squared = self.moves * self.clean.pair_norm.square() * (1.0 - 2.0 * self.clean.weight)
        return (squared + self.pair_energy).clamp_min(0.0)

    @cached_property
    def contrast(self) -> Float[Tensor, "h n n"]:
        """``|e_j - w|`` over movable tokens: the norm of the map from moves to ``delta_j - dbar``."""
        squared = self.moves * (1.0 - 2.0 * self.clean.weight) + self.weight_energy
        return (squared + CANCELLATION).clamp_min(0.0).sqrt()

    @cached_property
    def own_contrast(self) -> Float[Tensor, "h n n"]:
        """``[j = i] - w_ii``: share of the query token itself in ``delta_j - dbar`` (0 where it does not move)."""
        return own_share(self.clean.weight, self.moves)

    @cached_property
    def logit_reach(self) -> Float[Tensor, "h n n"]:
        """``sup |l_j|`` over moves of Frobenius norm 1: the norm of the functional l_j (eq. 6)."""
        own = self.moves[:, None]
        query = own * self.clean.query_distance.square()
        crossed = 2.0 * own * self.own_contrast * self.clean.cross
        squared = self.key_reach + query + crossed
        size = self.clean.pair_norm.amax(dim=-1, keepdim=True).square() + query + crossed.abs()
        return (squared + CANCELLATION * size).clamp_min(0.0).sqrt()

    @cached_property
    def gram(self) -> Float[Tensor, "h n n n"]:
        """Inner products of the functionals l_j, l_m of one row-head (eq. 7); only for n <= GRAM_LIMIT."""
        return self.gram_of(slice(None))

    def gram_of(self, chosen: slice) -> Float[Tensor, "h m n n"]:
        """``gram`` of some rows; without rotary positions some heads at a time, which stay in the cache."""
        heads = self.clean.layer.heads
        count = heads if self.clean.layer.rotary is not None else max(1, TOGETHER // self.n**3)
        return torch.cat([self._gram(slice(k, k + count), chosen) for k in range(0, heads, count)])

    def _gram(self, heads: slice, chosen: slice) -> Float[Tensor, "c m n n"]:
        clean, energy = self.clean, self.weight_energy[heads]
        weighted, base = clean.weight[heads, chosen] * self.moves, self.moves
        slope = clean.beta_norm[heads, chosen, None, None].square()
        if clean.layer.rotary is not None:
            base = self.moves * clean.pair_norm[:, chosen].square()
            weighted, slope, energy = clean.weight[:, chosen] * base, torch.ones_like(slope), self.pair_energy
        out = torch.diag_embed(base.expand_as(weighted)).add_(energy[:, chosen, :, None])
        out = out.sub_(weighted[..., :, None]).sub_(weighted[..., None, :]).mul_(slope)
        centred = self._query_parts(heads, chosen)
        crossed = self.own_contrast[heads, chosen, :, None] * clean.cross[heads, chosen, None, :]
        return out.add_(centred @ centred.mT).add_(crossed).add_(crossed.mT)

    def _query_parts(self, heads: slice, chosen: slice) -> Float[Tensor, "c m n r"]:
        """Coefficients of delta_i in l_j, up to an isometry, for some heads and rows i; rotary: all heads."""
        clean = self.clean
        if clean.layer.rotary is not None:
            index = range(self.n)[chosen]
            return torch.stack([pulled_keys(clean, clean.query_factor, i) * self.moves[i] for i in index], dim=1)
        rotated, mean = clean.centred_keys
        centred: Tensor = (rotated[heads, None] - mean[heads, chosen, None]) * self.moves[chosen, None, None]
        return centred

    @cached_property
    def value_reach(self) -> Float[Tensor, "h n"]:
        """``||sum over movable j of w_j^2 vh_j vh_j^T||_2^{1/2}``: the norm of ``t -> sum_j w_j t_j vh_j`` (eq. 9)."""
        return self._value_reach(self.clean.weight.square() * self.moves)

    def _value_reach(self, squared: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """``||sum_j squared_j vh_j vh_j^T||_2^{1/2}``."""
        size = self.clean.values.shape[-1]
        outer = (self.clean.values[..., :, None] * self.clean.values[..., None, :]).flatten(-2)
        second = (squared @ outer).unflatten(-1, (size, size))
        first = squared @ self.clean.values
        mixed = first[..., :, None] * self.clean.averages[..., None, :]
        total = squared.sum(dim=-1)[..., None, None]
        moment = second - mixed - mixed.transpose(-1, -2)
        moment = moment + total * self.clean.averages[..., :, None] * self.clean.averages[..., None, :]
        largest = torch.linalg.eigvalsh(moment)[..., -1]
        scale = second.diagonal(dim1=-2, dim2=-1).sum(-1) + total[..., 0, 0] * self.clean.averages.square().sum(-1)
        reach: Tensor = (largest + CANCELLATION * scale).clamp_min(0.0).sqrt()
        return reach

    @cached_property
    def first_order_reach(self) -> Float[Tensor, "h n"]:
        """Upper bound of ``|E[l vh]|`` over moves of norm 1: key part ``B value_reach``, query part ``||W_q C||``."""
        clean = self.clean
        if clean.layer.rotary is not None:
            query = query_covariances(clean, clean.query_factor, clean.values, clean.averages) * self.moves
            return self._value_reach((clean.weight * clean.pair_norm).square() * self.moves) + query
        rotated, mean = self.clean.centred_keys
        covariance = (
            self.clean.weight @ (rotated[..., :, None] * self.clean.values[..., None, :]).flatten(-2)
        ).unflatten(-1, (rotated.shape[-1], self.clean.values.shape[-1]))
        covariance = covariance - mean[..., :, None] * self.clean.averages[..., None, :]
        query = torch.linalg.matrix_norm(covariance, 2) * self.moves
        reach: Tensor = self.clean.beta_norm * self.value_reach + query
        return reach

    @cached_property
    def average_reach(self) -> Float[Tensor, "h n"]:
        """``sup |a|`` over moves of norm 1, ``a = E gamma + E[l vh]`` the first-order change of the row (eq. 8)."""
        return self.clean.value_norms[:, None] * self.weight_energy[..., 0].sqrt() + self.first_order_reach


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """``|points_j - centres_i|`` for every i, j, rounded outward: (h, n, n)."""
    return outward(torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist"), CANCELLATION)


def stack_weights(rows: MovingRows) -> Float[Tensor, "n"]:
    """Row weights rho of the squared norms: 1 for the whole output, pi for a pooled one (eq. 11)."""
    ones = torch.ones(rows.n, dtype=rows.clean.points.dtype, device=rows.clean.points.device)
    return ones if rows.row_weights is None else rows.row_weights
