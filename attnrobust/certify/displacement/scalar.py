"""Displacement certificate: scalar functions of the softmax remainder and absolute values of third cumulants."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CELLS = 24  # cells of the supremum in ``saturating_weight``; more cells only tighten it
SHORT = 1.0  # reach up to which a third of the cells is as good
BLOCK = 2**14  # numbers at once: intermediate results stay in the cache
LARGE = 40.0  # beyond, psi is computed as exp(u) (1 - (1 + u) exp(-u)) in log space
EIGENVALUE_ERROR = 1e-14  # of a decomposition, in units of the largest eigenvalue
SMALL = 1e-2  # below, psi(u) / (u^2 / 2) is summed as a series


def log_psi(u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``log(e^u - 1 - u)`` for u >= 0 (-inf at 0), without overflow and without cancellation."""
    return _log_psi_of(u, log_phi(u))


def _log_psi_of(u: Tensor, log_phi_u: Tensor) -> Tensor:
    return torch.where(u > 0, 2.0 * u.clamp_min(1e-300).log() - 0.6931471805599453 + log_phi_u, -torch.inf)


def log_phi(u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``log(2 (e^u - 1 - u) / u^2)`` for u >= 0; 0 at 0, increasing."""
    series = 1.0 + u / 3.0 * (1.0 + u / 4.0 * (1.0 + u / 5.0 * (1.0 + u / 6.0 * (1.0 + u / 7.0 * (1.0 + u / 8.0)))))
    middle = u.clamp(SMALL, LARGE)
    direct = (2.0 * (torch.expm1(middle) - middle) / middle.square()).log()
    if not bool((u > LARGE).any()):  # the usual case, at half the cost
        return torch.where(u < SMALL, series.log(), direct)
    far = u.clamp_min(LARGE)
    large = far + torch.log1p(-(1.0 + far) * torch.exp(-far)) + 0.6931471805599453 - 2.0 * far.log()
    return torch.where(u < SMALL, series.log(), torch.where(u > LARGE, large, direct))


def phi_negative(u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``2 (e^{-u} - 1 + u) / u^2`` for u >= 0; 1 at 0, decreasing, in (0, 1]."""
    series = 1.0 - u / 3.0 * (1.0 - u / 4.0 * (1.0 - u / 5.0 * (1.0 - u / 6.0 * (1.0 - u / 7.0 * (1.0 - u / 8.0)))))
    far = u.clamp_min(SMALL)
    direct = 2.0 * (torch.expm1(-far) + far) / far.square()
    return torch.where(u < SMALL, series, direct)


def saturating_weight(log_w: Float[Tensor, "*s"], reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``sup over |u| <= reach of 2 w psi(u) / (u^2 (1 + w psi(u)))``, at least w (docs eq. 5).

    On a cell a <= u <= b the quotient is at most ``w phi(b) / (1 + w psi(a))`` and at most ``2 s(b) / a^2`` with
    ``s = w psi / (1 + w psi)``; negative u are covered because psi(-|u|) <= psi(|u|).
    """
    return _blockwise(_saturating_block, log_w, reach)


def growing_weight(log_w: Float[Tensor, "*s"], reach: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Upper bound of ``sup over |u| <= reach of w |e^u - 1| / (|u| (1 + P))``, at least w (docs eq. 5a).

    On a cell 0 <= a <= u <= b the quotient is at most ``w (e^b - 1) / (b (1 + w psi(a)))``, and at most 1/a because
    ``w e^u <= E e^u = 1 + P``; for negative u it is at most w.
    """
    return _blockwise(_growing_block, log_w, reach)


def _blockwise(function: Callable[[Tensor, Tensor], Tensor], log_w: Tensor, reach: Tensor) -> Tensor:
    flat, rest = log_w.reshape(-1), reach.expand_as(log_w).reshape(-1)
    blocks = zip(flat.split(BLOCK), rest.split(BLOCK), strict=True)
    return torch.cat([function(*block) for block in blocks]).reshape(log_w.shape)


def _growing_block(log_w: Float[Tensor, "m"], reach: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    best = log_w.exp()
    left, before = torch.zeros_like(reach), torch.zeros_like(reach)  # before: log(1 + w psi(left))
    cells = CELLS if float(reach.max()) > SHORT else CELLS // 3
    for cell in range(1, cells + 1):
        right = reach * (cell / cells) ** 1.5
        rate = right + torch.log(-torch.expm1(-right) / right.clamp_min(1e-300))  # log((e^u - 1) / u), -inf at 0
        grown = torch.exp(log_w + rate - before)
        if cell > 1:
            grown = torch.minimum(grown, 1.0 / left.clamp_min(1e-300))
        best = torch.maximum(best, grown)
        left, before = right, torch.nn.functional.softplus(log_w + log_psi(right))
    return torch.where(torch.isneginf(log_w), torch.zeros_like(best), best)


def _saturating_block(log_w: Float[Tensor, "m"], reach: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    best = log_w.exp()
    left, before = torch.zeros_like(reach), torch.zeros_like(reach)  # before: log(1 + w psi(left))
    # Nodes denser near 0 where the reach is large, so that the quotient's peak at moderate u is resolved.
    exponent = 1.5 + (reach.clamp_min(3.0) / 3.0).log().clamp_max(2.0)
    cells = CELLS if float(reach.max()) > SHORT else CELLS // 3
    for cell in range(1, cells + 1):
        right = reach * (cell / cells) ** exponent
        growth = log_phi(right)
        log_share = log_w + _log_psi_of(right, growth)
        after = torch.nn.functional.softplus(log_share)
        grown = torch.exp(log_w + growth - before)
        if cell > 1:
            grown = torch.minimum(grown, 2.0 * torch.exp(log_share - after) / left.square().clamp_min(1e-300))
        best = torch.maximum(best, grown)
        left, before = right, after
    return torch.where(torch.isneginf(log_w), torch.zeros_like(best), best)


def psd_root(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """Symmetric square root of positive semidefinite matrices, never below it in any direction.

    The root turns an error of an eigenvalue near 0 into its square root, so eigenvalues are moved outward first.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0.0) + EIGENVALUE_ERROR * values[..., -1:].clamp_min(0.0)
    root: Tensor = (vectors * values.sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
    return root


def cumulant_modulus(weights: Float[Tensor, "*b n"], spread: Float[Tensor, "*b n v"]) -> Float[Tensor, "*b n n"]:
    """N with ``|kappa_3(v, l, l)| <= l^T N l`` for every l (docs eq. 12).

    For a unit vector c, ``c . kappa_3(v, l, l) = l^T K_c l`` with ``K_c = D_c - d_c w^T - w d_c^T``,
    ``d_c = (w_j c.vh_j)``, ``D_c = diag(d_c)``. Over an orthonormal basis, ``N = (sum_e K_e^2)^{1/2}`` dominates every
    ``+-K_c``: ``K_c^2 <= sum_e K_e^2`` (Cauchy-Schwarz) and the root is operator monotone.

    Args:
        weights: Softmax weights w.
        spread: Deviations ``vh_j = v_j - E v`` (their weighted mean is 0).
    """
    scaled = weights[..., :, None] * spread
    gram = scaled @ scaled.transpose(-1, -2)
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    pulled = (gram @ weights[..., :, None])[..., 0]
    column, row = weights[..., :, None], weights[..., None, :]
    half = -diagonal[..., :, None] * row - column * gram + pulled[..., :, None] * row
    square = torch.diag_embed(diagonal) + half + half.transpose(-1, -2)
    square = square + weights.square().sum(-1)[..., None, None] * gram
    square = square + diagonal.sum(-1)[..., None, None] * column * row
    return psd_root(square)
