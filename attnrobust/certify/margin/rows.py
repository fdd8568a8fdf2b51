"""What the margin certificate needs of a layer at one clean input, for all heads and rows at once."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.certify.shared.softmax_rows import SoftmaxRows, own_share
from attnrobust.layers.attention import Attention
from attnrobust.numerics.rounding import CANCELLATION, FORMULA, outward
from attnrobust.numerics.triangle import triangle
from attnrobust.problem import Problem

GRAM_LIMIT = 96  # up to this many tokens the Gram tensors of all rows are kept (h n^3 numbers)


@dataclass(frozen=True, eq=False)
class MarginRows(SoftmaxRows):
    """Clean quantities that no functional and no radius changes.

    Centred under the clean weights w, the linear part of a logit change is ``l_j.Delta``,
    ``l_j = (e_j - w) (x) beta_i + e_i (x) (alpha_j - mean alpha)``.

    Args:
        movable: 1.0 where a token may move.
    """

    movable: Float[Tensor, "n"]

    @cached_property
    def projection(self) -> Float[Tensor, "d p"]:
        """``[w_q w_k]`` of all heads side by side, p = 2 h k: one product instead of one per head."""
        both = torch.cat([self.layer.w_q, self.layer.w_k], dim=-1)
        return both.transpose(0, 1).flatten(1)

    @property
    def index(self) -> Bool[Tensor, "n"]:
        """Movable tokens as booleans."""
        return self.movable > 0

    @cached_property
    def alpha_mean(self) -> Float[Tensor, "h n d"]:
        """``sum_j w_ij alpha_j``."""
        return self.weight @ self.alpha

    @cached_property
    def own(self) -> Float[Tensor, "h n n"]:
        """delta_i-coordinate of ``e_j - w``."""
        return own_share(self.weight, self.movable)

    @cached_property
    def rest(self) -> Float[Tensor, "h n n"]:
        """``||(e_j - w) on the movable tokens other than i||``."""
        return _rest_norm(self.weight, self.movable)

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        norms = [_norms(matrix) for matrix in _small_bilinear(self.layer)]
        return torch.stack([norm for norm, _ in norms]), torch.stack([radius for _, radius in norms])

    @property
    def norm(self) -> Float[Tensor, "h"]:
        """Upper bound of ``||A||_2``."""
        return self._norms[0]

    @property
    def numerical(self) -> Float[Tensor, "h"]:
        """Upper bound of ``max |x A x| / |x|^2``."""
        return self._norms[1]


def margin_rows(problem: Problem, *, everywhere: bool = False) -> MarginRows:
    """The clean quantities of a problem whose network is one attention layer.

    Args:
        problem: The question.
        everywhere: Treat every token as movable, whatever the threat says.
    """
    layer = problem.network
    assert isinstance(layer, Attention)  # noqa: S101 - the method refuses other networks before
    x = problem.clean.points
    movable = x.new_ones(problem.clean.n) if everywhere else problem.moves.movable(problem.clean.n).to(x)
    return MarginRows(layer, x, problem.mass, movable)


def _rest_norm(weight: Tensor, movable: Tensor) -> Tensor:
    """``||(e_j - w) on T without i||`` for every (h, i, j)."""
    n = weight.shape[-1]
    eye = torch.eye(n, dtype=weight.dtype, device=weight.device)
    squares = (weight**2) @ movable - weight.diagonal(dim1=1, dim2=2) ** 2 * movable  # sum over T without i
    jump = (1.0 - 2.0 * weight) * movable * (1.0 - eye)  # (1 - w_j)^2 - w_j^2 where j itself may move
    return ((squares[..., None] + jump).clamp_min(0.0) + CANCELLATION).sqrt()


def _small_bilinear(layer: Attention) -> list[Tensor]:
    """A per head in an orthonormal basis of the columns of [w_q w_k] (at most 2k): same norm and numerical radius."""
    k = layer.key_width
    if 2 * k >= layer.width:
        return list(layer.bilinear)
    small = triangle(torch.cat([layer.w_q, layer.w_k], dim=-1))
    return list(layer.factor * small[..., :k] @ small[..., k:].mT)


def _norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    spectral = torch.linalg.matrix_norm(matrix, 2)
    symmetric = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).abs().amax()
    norm = outward(spectral, FORMULA)
    return norm, torch.minimum(symmetric + FORMULA * spectral, norm)


def own_block(rows: MarginRows, order: float) -> Float[Tensor, "h n n"]:
    """Norm of the delta_i-block ``own_j beta_i + alpha_j - mean alpha`` of l_j (order 2, 1, inf); 0 if i is fixed."""
    if order == 2.0:
        return _own_norm(rows)
    out = torch.empty_like(rows.weight)
    for i in range(rows.n):  # d-dimensional blocks of one row of all heads at a time: h n d numbers
        block = _own_vectors(rows, i)
        out[:, i] = torch.linalg.vector_norm(block, ord=order, dim=-1) * rows.movable[i]
    return out


def _own_vectors(rows: MarginRows, i: int) -> Float[Tensor, "h n d"]:
    return rows.own[:, i, :, None] * rows.beta[:, i, None, :] + rows.alpha - rows.alpha_mean[:, i, None, :]


def _own_norm(rows: MarginRows) -> Float[Tensor, "h n n"]:
    """The 2-norm of the delta_i-blocks from Gram entries, padded outward."""
    gram = rows.alpha @ rows.alpha.mT
    mean = rows.weight @ gram
    square = gram.diagonal(dim1=1, dim2=2)[:, None, :] - 2.0 * mean + (mean * rows.weight).sum(-1)[..., None]
    cross = rows.beta @ rows.alpha.mT
    cross = cross - (cross * rows.weight).sum(-1)[..., None]
    length = (rows.beta**2).sum(-1)[..., None]
    pad = 16.0 * CANCELLATION * (gram.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None] + length)
    total = rows.own**2 * length + 2.0 * rows.own * cross + square
    return (total.clamp_min(0.0) + pad).sqrt() * rows.movable[:, None]


def own_gram(rows: MarginRows) -> Float[Tensor, "h n n n"]:
    """Gram matrix over (j, j') of the delta_i-blocks of l_j, for every row (h, i)."""
    out = rows.weight.new_empty(*rows.weight.shape, rows.n)
    for i in range(rows.n):
        block = _own_vectors(rows, i)
        out[:, i] = block @ block.mT * rows.movable[i]
    return out


def direction_gram(rows: MarginRows) -> Float[Tensor, "h n n n"]:
    """Gram matrix over (j, j') of the l_j restricted to the movable tokens, for every row (h, i)."""
    w, m = rows.weight, rows.movable
    wm = w * m
    squares = (wm**2).sum(-1)
    # (e_j - w)_T.(e_j' - w)_T = [j = j' in T] - w_j [j in T] - w_j' [j' in T] + sum_T w^2, then without token i
    overlap = torch.diag(m) - wm[..., :, None] - wm[..., None, :] + squares[..., None, None]
    overlap = overlap - rows.own[..., :, None] * rows.own[..., None, :]
    return overlap * (rows.beta**2).sum(-1)[..., None, None] + own_gram(rows)
