"""The bilinear forms ``A_il = s w_q R_i R_l^T w_k^T`` of a layer with rotary positions: what all pairs share.

Section 2 of docs/rotary-certificates.md.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.layers.rotary import Rotary
from attnrobust.numerics.eigenvalues import power_eigenvalue
from attnrobust.numerics.rounding import FORMULA, SMALLEST_UNIT, outward
from attnrobust.numerics.triangle import triangle

GAUGE_STEPS, GAUGE_RATE = 40, 0.1  # of the descent in the gauge; any gauge is sound
DECOMPOSED = 512  # turns up to which their forms are decomposed; a decomposition is several times slower than powers
CHUNK_NUMBERS = 20_000_000  # float64 numbers per temporary: about 160 MB


def rotary_of(layer: Attention) -> Rotary:
    """The positions of a layer that has rotary ones."""
    assert layer.rotary is not None  # noqa: S101 - asked before; narrows the type
    return layer.rotary


def largest_form_norm(layer: Attention, n: int, *, at: Int[Tensor, "q"] | None = None) -> Float[Tensor, "h"]:
    """Upper bound of ``max_il ||A_il||_2`` over all pairs of n tokens, or over those whose i is in ``at``.

    ``||w_q R w_k^T|| = ||T_q R T_k^T||`` with the triangles of the weights; the turns ``R_i R_l^T`` are those of the
    differences of the positions, up to the rounding of the angles, which grows with the offset.
    """
    right_q, right_k = triangle(layer.w_q), triangle(layer.w_k)
    turns = rotary_of(layer).differences(n, at)
    angles = turns.angles
    assert angles is not None  # noqa: S101 - differences are explicit; narrows the type
    best = right_q.new_zeros(layer.heads)
    for part in angles.split(max(1, CHUNK_NUMBERS // right_q.numel())):
        turn = Rotary(angles=part, layout=turns.layout)
        turned = turn.turn(right_q[:, :, None, :].expand(-1, -1, len(part), -1))  # (h, r, m, k)
        best = torch.maximum(best, _norms(turned.transpose(1, 2) @ right_k.mT[:, None], len(angles)).amax(dim=1))
    norms = [torch.linalg.matrix_norm(right, 2) for right in (right_q, right_k)]
    best = torch.minimum(best + _turn_error(layer, n) * norms[0] * norms[1], norms[0] * norms[1])
    return outward(abs(layer.factor) * best, FORMULA)


def _norms(forms: Float[Tensor, "h m r s"], count: int) -> Float[Tensor, "h m"]:
    """Upper bounds of the spectral norms: decompositions of a few, powers of many (at most ``k^(1/128)`` too large)."""
    if count <= DECOMPOSED:
        found: Tensor = torch.linalg.matrix_norm(forms, 2)
        return found
    return power_eigenvalue(forms.mT @ forms, squarings=5).sqrt()


def _turn_error(layer: Attention, n: int) -> float:
    """How far ``R_i R_l^T`` may be from the turn by the difference: angles are rounded to units of their own size."""
    largest = float(rotary_of(layer).angle_table(n).abs().max())
    return min(2.0, 4.0 * torch.finfo(torch.float64).eps * (1.0 + largest))


def key_gradient_norms(
    layer: Attention, queries: Float[Tensor, "h q k"], n: int, *, order: float = 2.0
) -> Float[Tensor, "h q n"]:
    """Upper bound of ``|beta_il|``, the gradient of score s_il in the key token l, for every query i.

    Args:
        layer: The layer.
        queries: ``s q_i R_i``, of all tokens or of some.
        n: Tokens l.
        order: Of the norm.
    """
    right = triangle(layer.w_k) if order == 2.0 else layer.w_k
    out = []
    index = torch.arange(n, device=queries.device)
    for part in index.split(max(1, CHUNK_NUMBERS // (queries.shape[0] * queries.shape[1] * max(right.shape[1:])))):
        pulled = layer.turned_back(queries[:, :, None, :].expand(-1, -1, len(part), -1), part)  # (h, i, l, k)
        out.append(torch.linalg.vector_norm(pulled @ right.mT[:, None], ord=order, dim=-1))
    return outward(torch.cat(out, dim=-1), FORMULA)


def gauge(layer: Attention) -> Float[Tensor, "h k"]:
    """A diagonal ``G >= w_k^T w_k`` that commutes with every turn, with ``||w_q G^(1/2)||`` small.

    Then ``|delta_l w_k R_l G^(-1/2)| <= |delta_l|``. A diagonal D that is equal on the two coordinates of every plane
    commutes with all turns, and so does ``G = D lambda_max(D^(-1/2) w_k^T w_k D^(-1/2))``, which is at least
    ``w_k^T w_k``. D minimises the product of the two norms, by descent in its logarithm.
    """
    rotary = rotary_of(layer)
    query, key = layer.w_q.mT @ layer.w_q, layer.w_k.mT @ layer.w_k
    sizes = [rotary.pair_means(gram.diagonal(dim1=1, dim2=2)) for gram in (query, key)]
    floors = [size.amax(-1, keepdim=True) * 1e-12 + SMALLEST_UNIT for size in sizes]
    start = 0.5 * ((sizes[1] + floors[1]) / (sizes[0] + floors[0])).log()
    diagonal = _descended(rotary, query, key, start)
    largest = _largest(key, 1.0 / diagonal)
    return outward(diagonal * (largest * (1.0 + FORMULA) + SMALLEST_UNIT)[:, None], FORMULA)


def _descended(rotary: Rotary, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
    """The diagonal D with the smallest product of norms that a few steps find."""
    best, found = start.new_full((start.shape[0],), torch.inf), start.exp()
    raw = start.clone().requires_grad_(True)
    search = torch.optim.Adam([raw], lr=GAUGE_RATE)
    for _ in range(GAUGE_STEPS):
        with torch.enable_grad():
            diagonal = rotary.pair_means(raw).exp()
            value = _largest(query, diagonal).clamp_min(SMALLEST_UNIT).log()
            value = value + _largest(key, 1.0 / diagonal).clamp_min(SMALLEST_UNIT).log()
            search.zero_grad()
            value.sum().backward()  # type: ignore[no-untyped-call,unused-ignore]
        better = value.detach() < best
        best = torch.where(better, value.detach(), best)
        found = torch.where(better[:, None], diagonal.detach(), found)
        search.step()
    return found


def _largest(gram: Tensor, diagonal: Tensor) -> Tensor:
    """``lambda_max(D^(1/2) gram D^(1/2))`` per head."""
    root = diagonal.sqrt()
    values: Tensor = torch.linalg.eigvalsh(root[:, :, None] * gram * root[:, None, :])[:, -1]
    return values
