"""What the margin certificate needs of a layer at one clean input, for all heads and rows at once."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.certify.shared.softmax_rows import SoftmaxRows, own_entries, own_share, own_values
from attnrobust.layers.attention import Attention
from attnrobust.numerics.rounding import CANCELLATION, FORMULA, outward
from attnrobust.numerics.triangle import triangle
from attnrobust.problem import Problem

GRAM_LIMIT = 96  # up to this many tokens the Gram tensors of all rows are kept (h n^3 numbers)


@dataclass(frozen=True, eq=False)
class MarginRows(SoftmaxRows):
    """Clean quantities that no functional and no radius changes.

    Centred under the clean weights w, the linear part of a logit change is ``l_j.Delta``,
    ``l_j = (e_j - w) (x) beta_i + e_i (x) (alpha_j - mean alpha)``; with rotary positions block l of the first part is
    ``(e_j - w)_l beta_il`` and the second has ``alpha_ij``.

    Args:
        movable: 1.0 where a token may move.
    """

    movable: Float[Tensor, "n"] = field(kw_only=True)

    @cached_property
    def projection(self) -> Float[Tensor, "d p"]:
        """``[w_q w_k]`` of all heads side by side, p = 2 h k: one product instead of one per head."""
        both = torch.cat([self.layer.w_q, self.layer.w_k], dim=-1)
        return both.transpose(0, 1).flatten(1)

    @property
    def sharing(self) -> int:
        """How many heads use one image of the moves under a key map: of rows on their own those that share keys."""
        single = self.at is None or self.layer.kv_heads is None
        return 1 if single else self.layer.heads // (self.layer.kv_heads or 1)

    @cached_property
    def shared_keys(self) -> Float[Tensor, "d gk"]:
        """The different ones of the key maps side by side."""
        return self.layer.w_k[:: self.sharing].transpose(0, 1).flatten(1)

    @cached_property
    def own_movable(self) -> Float[Tensor, "q"]:
        """1.0 where the token of the row itself may move."""
        return self.movable if self.at is None else self.movable[self.at]

    @property
    def index(self) -> Bool[Tensor, "n"]:
        """Movable tokens as booleans."""
        return self.movable > 0

    @cached_property
    def alpha_mean(self) -> Float[Tensor, "h q d"]:
        """``sum_j w_ij alpha_j``."""
        return self.weight @ self.alpha

    @cached_property
    def own(self) -> Float[Tensor, "h q n"]:
        """delta_i-coordinate of ``e_j - w``."""
        return own_share(self.weight, self.movable, self.at)

    @cached_property
    def rest(self) -> Float[Tensor, "h q n"]:
        """``||(e_j - w) on the movable tokens other than i||``."""
        return rest_norm(self.weight, self.movable, self.at)

    @cached_property
    def key_gram(self) -> Float[Tensor, "h k k"]:
        """``s^2 w_k^T w_k``: ``|A^T delta_i|^2 = query (s^2 w_k^T w_k) query`` with ``query = delta_i w_q``."""
        return self.layer.factor**2 * self.layer.w_k.mT @ self.layer.w_k

    def pulled_keys(self, i: int) -> Float[Tensor, "h n k"]:
        """Rotary positions: ``(s k_j R_j - mean) R_i^T``, so that ``alpha_ij - mean alpha`` is w_q times them.

        Args:
            i: Which of the rows that are there.
        """
        centred = self.keys - self.weight[:, i, None, :] @ self.keys
        return self.layer.turned_back(centred, self.asked[i].expand(self.n))

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        norms = [_norms(matrix) for matrix in _small_bilinear(self.layer)]
        return torch.stack([norm for norm, _ in norms]), torch.stack([radius for _, radius in norms])

    @property
    def norm(self) -> Float[Tensor, "h"]:
        """Upper bound of ``||A||_2``, with rotary positions of every ``||A_ij||_2``."""
        return self._norms[0] if self.layer.rotary is None else self.form_norm

    @property
    def numerical(self) -> Float[Tensor, "h"]:
        """Upper bound of ``max |x A x| / |x|^2``, A that of a token with itself."""
        return self._norms[1]


def margin_rows(problem: Problem, *, everywhere: bool = False, asked: bool = False) -> MarginRows:
    """The clean quantities of a problem whose network is one attention layer.

    Args:
        problem: The question.
        everywhere: Treat every token as movable, whatever the threat says.
        asked: Only of the rows that the goal looks at.
    """
    layer = problem.network
    assert isinstance(layer, Attention)  # noqa: S101 - the method refuses other networks before
    x = problem.clean.points
    movable = x.new_ones(problem.clean.n) if everywhere else problem.moves.movable(problem.clean.n).to(x)
    weights = problem.resolved.weights
    at = None if not asked or weights is None or bool((weights != 0).all()) else weights.nonzero().flatten()
    return MarginRows(layer, x, problem.mass, at, movable=movable)


def rest_norm(
    weight: Float[Tensor, "h q n"], c: Float[Tensor, "*r n"], at: Int[Tensor, "q"] | None = None
) -> Float[Tensor, "h q n"]:
    """``(sum_(l != i) c_l (e_j - w)_l^2)^(1/2)`` for every (h, i, j); c_l is [l may move], or (h, i, l)."""
    eye = own_entries(weight, at)
    if c.ndim == 1:
        whole, own = (weight**2) @ c, c if at is None else c[at]
    else:
        whole, own = (weight**2 * c).sum(-1), own_values(c, at)
    squares = whole - own_values(weight, at) ** 2 * own  # sum over the tokens without i
    jump = (1.0 - 2.0 * weight) * c * (1.0 - eye)  # (1 - w_j)^2 - w_j^2 where j itself may move
    pad = CANCELLATION if c.ndim == 1 else CANCELLATION * c.amax(-1, keepdim=True)
    return ((squares[..., None] + jump).clamp_min(0.0) + pad).sqrt()


def _small_bilinear(layer: Attention) -> list[Tensor]:
    """A per head in an orthonormal basis of the columns of [w_q w_k] (at most 2k): same norm and numerical radius."""
    k = layer.key_width
    if 2 * k >= layer.width:
        return list(layer.factor * layer.w_q @ layer.w_k.transpose(-1, -2))
    small = triangle(torch.cat([layer.w_q, layer.w_k], dim=-1))
    return list(layer.factor * small[..., :k] @ small[..., k:].mT)


def _norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    spectral = torch.linalg.matrix_norm(matrix, 2)
    symmetric = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).abs().amax()
    norm = outward(spectral, FORMULA)
    return norm, torch.minimum(symmetric + FORMULA * spectral, norm)


def own_block(rows: MarginRows, order: float) -> Float[Tensor, "h q n"]:
    """Norm of the delta_i-block ``own_j beta_i + alpha_j - mean alpha`` of l_j (order 2, 1, inf); 0 if i is fixed."""
    if order == 2.0:
        return _own_norm(rows) if rows.layer.rotary is None else _own_norm_of_pairs(rows)
    out = torch.empty_like(rows.weight)
    for i in range(rows.asked.numel()):  # d-dimensional blocks of one row of all heads at a time: h n d numbers
        block = _own_vectors(rows, i)
        out[:, i] = torch.linalg.vector_norm(block, ord=order, dim=-1) * rows.own_movable[i]
    return out


def _own_vectors(rows: MarginRows, i: int) -> Float[Tensor, "h n d"]:
    if rows.layer.rotary is not None:
        return rows.own[:, i, :, None] * rows.beta[:, i, None, :] + rows.pulled_keys(i) @ rows.layer.w_q.mT
    return rows.own[:, i, :, None] * rows.beta[:, i, None, :] + rows.alpha - rows.alpha_mean[:, i, None, :]


def _own_norm(rows: MarginRows) -> Float[Tensor, "h q n"]:
    """The 2-norm of the delta_i-blocks from Gram entries, padded outward."""
    gram = rows.alpha @ rows.alpha.mT
    mean = rows.weight @ gram
    square = gram.diagonal(dim1=1, dim2=2)[:, None, :] - 2.0 * mean + (mean * rows.weight).sum(-1)[..., None]
    cross = rows.beta @ rows.alpha.mT
    cross = cross - (cross * rows.weight).sum(-1)[..., None]
    length = (rows.beta**2).sum(-1)[..., None]
    pad = 16.0 * CANCELLATION * (gram.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None] + length)
    total = rows.own**2 * length + 2.0 * rows.own * cross + square
    return (total.clamp_min(0.0) + pad).sqrt() * rows.own_movable[:, None]


def _own_norm_of_pairs(rows: MarginRows) -> Float[Tensor, "h q n"]:
    """The 2-norm of the delta_i-blocks from their vectors in 2 k coordinates."""
    k, queries = rows.layer.key_width, rows.layer.turned_back(rows.queries, rows.at)
    small = triangle(torch.cat([rows.layer.w_q, rows.layer.w_k], dim=-1))
    out = torch.empty_like(rows.weight)
    for i in range(rows.asked.numel()):
        block = rows.pulled_keys(i) @ small[..., :k].mT
        block = block + rows.own[:, i, :, None] * (queries[:, i, None, :] @ small[..., k:].mT)
        out[:, i] = torch.linalg.vector_norm(block, dim=-1) * rows.own_movable[i]
    longest = torch.linalg.vector_norm(rows.keys, dim=-1).amax(-1) * torch.linalg.matrix_norm(small[..., :k])
    pad: Tensor = CANCELLATION * longest[:, None, None] * rows.own_movable[:, None]
    norms: Tensor = outward(out, FORMULA) + pad
    return norms


def own_gram(rows: MarginRows) -> Float[Tensor, "h q n n"]:
    """Gram matrix over (j, j') of the delta_i-blocks of l_j, for every row (h, i)."""
    out = rows.weight.new_empty(*rows.weight.shape, rows.n)
    for i in range(rows.asked.numel()):
        block = _own_vectors(rows, i)
        out[:, i] = block @ block.mT * rows.own_movable[i]
    return out


def direction_gram(rows: MarginRows) -> Float[Tensor, "h q n n"]:
    """Gram matrix over (j, j') of the l_j restricted to the movable tokens, for every row (h, i)."""
    if rows.layer.rotary is not None:
        return _overlap(rows, rows.movable * rows.pair_norm**2) + own_gram(rows)
    return _overlap(rows, rows.movable) * (rows.beta**2).sum(-1)[..., None, None] + own_gram(rows)


def _overlap(rows: MarginRows, c: Float[Tensor, "*r n"]) -> Float[Tensor, "h q n n"]:
    """``sum_(l != i) c_l (e_j - w)_l (e_j' - w)_l``, c = 0 on tokens that may not move.

    Over all l it is ``[j = j'] c_j - w_j c_j - w_j' c_j' + sum c w^2``.
    """
    w = rows.weight
    wm = w * c
    squares = (wm * w).sum(-1)
    overlap = torch.diag_embed(c) - wm[..., :, None] - wm[..., None, :] + squares[..., None, None]
    own = rows.own if c.ndim == 1 else rows.own * own_values(c, rows.at).sqrt()[..., None]
    return overlap - own[..., :, None] * own[..., None, :]
