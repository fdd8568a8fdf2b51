"""Displacement certificate: the remainder's coefficients at one radius (docs section 4)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement_base import CANCELLATION, GRAM_LIMIT, CleanRows, stack_weights
from attnrobust.certify.displacement_scalar import (
    cumulant_modulus,
    log_phi,
    log_psi,
    phi_negative,
    psd_root,
    saturating_weight,
)


@dataclass(frozen=True, eq=False)
class LogitForms:
    """``|(quadratic part)_g| <= l^T (N_g + diag(extra_g)) l`` on the ball, with N_g present where ``exact_g``.

    Args:
        exact: Whether row-head g uses the modulus of its cumulant (1) or its triangle inequality (0), (h, n).
        extra: Diagonal coefficients of l_j^2, (h, n, n).
        multiplier: Factor of row-head g in the stacked form, (h, n).
        constant: Bound of everything of third and fourth order that is not in the forms.
    """

    exact: Float[Tensor, "h n"]
    extra: Float[Tensor, "h n n"]
    multiplier: Float[Tensor, "h n"]
    constant: float

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed."""
        parts = (self.extra, self.multiplier)
        return math.isfinite(self.constant) and all(bool(torch.isfinite(part).all()) for part in parts)


@dataclass(frozen=True, eq=False)
class Majorant:
    """Builds ``LogitForms`` for any radius (Frobenius norm of the move)."""

    rows: CleanRows

    @property
    def small(self) -> bool:
        """Whether the (h, n, n, n) arrays are used."""
        return self.rows.n <= GRAM_LIMIT

    @cached_property
    def modulus(self) -> Float[Tensor, "h n n n"]:
        """N_g: half the modulus of the third cumulant, head by head to bound the memory."""
        rows = self.rows
        parts = [
            0.5 * cumulant_modulus(w, values[None] - average[:, None])
            for w, values, average in zip(rows.w, rows.values, rows.averages, strict=True)
        ]
        return torch.stack(parts)

    @cached_property
    def _modulus_reach(self) -> Float[Tensor, "h n"]:
        """``sup l^T N_g l`` over moves of norm 1."""
        parts = []
        for modulus, gram in zip(self.modulus, self.rows.gram, strict=True):
            root = psd_root(modulus)
            parts.append(torch.linalg.eigvalsh(root @ gram @ root)[..., -1].clamp_min(0.0) * (1.0 + 1e-10))
        return torch.stack(parts)

    def diagonal_reach(self, coefficient: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """Upper bound of ``sup sum_j coefficient_j l_j^2`` over moves of norm 1 (eq. 13)."""
        rows = self.rows
        if self.small:
            root = coefficient.sqrt()
            matrix = root[..., :, None] * rows.gram * root[..., None, :]
            scale = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1).clamp_min(1e-280)
            power = matrix / scale[..., None, None]
            power = power @ power
            power = power @ power
            reach: Tensor = scale * torch.linalg.matrix_norm(power).pow(0.25) * (1.0 + 1e-10)
            return reach
        largest = (coefficient * rows.moves).amax(dim=-1).sqrt()
        key = largest + coefficient.sum(dim=-1).sqrt() * rows.weight_energy[..., 0].sqrt()
        rotated, mean = rows.centred_keys
        distance = torch.cdist(mean, rotated, compute_mode="donot_use_mm_for_euclid_dist").square()
        query = (coefficient * distance).sum(dim=-1).sqrt() * rows.moves
        return (rows.slope_norms * key + query).square() * (1.0 + 1e-10)

    @cached_property
    def _variance_reach(self) -> Float[Tensor, "h n"]:
        return self.diagonal_reach(self.rows.w)

    def reach(self, radius: float) -> Float[Tensor, "h n n"]:
        """``U_j >= sup |l_j + q_j|`` on the ball of this radius (eq. 6)."""
        rows = self.rows
        own = rows.own_contrast.abs()
        product = 0.5 * (own + rows.contrast) * rows.moves[:, None] * rows.bilinear_norms[:, None, None]
        return radius * rows.logit_reach + radius**2 * product

    def _inverse_partition(self, reach: Tensor, radius: float) -> Float[Tensor, "h n 1"]:
        """Lower bound of ``1 / (1 + P)`` on the ball (eq. 10): P through the variance or term by term."""
        rows = self.rows
        bilinear = radius**2 * rows.bilinear_norms[:, None] * rows.w.amax(dim=-1).sqrt() * rows.moves
        deviation = (radius * self._variance_reach.sqrt() + bilinear).square()
        visible = reach.masked_fill(torch.isneginf(rows.log_w), 0.0)  # a weight that underflows may still grow back
        by_variance = 0.5 * deviation * torch.exp(log_phi(visible.amax(dim=-1)))
        by_term = torch.exp(rows.log_w + log_psi(visible)).sum(dim=-1)
        return 1.0 / (1.0 + torch.minimum(by_variance, by_term))[..., None]

    def forms(self, radius: float) -> LogitForms:
        """Coefficients valid for every move of Frobenius norm <= radius."""
        rows = self.rows
        reach = self.reach(radius)
        upper = saturating_weight(rows.log_w, reach)
        lower = rows.w * phi_negative(reach) * self._inverse_partition(reach, radius)
        drifted = rows.spread + radius * rows.drift
        slack = (radius * rows.bilinear_norms[:, None] / rows.logit_reach.amax(dim=-1).clamp_min(1e-300)).clamp(
            1e-9, 1.0
        )
        rest = upper * (radius * rows.drift + slack[..., None] * drifted)
        triangle = 0.5 * (upper * rows.spread + rest)
        reach_triangle = self.diagonal_reach(triangle)
        if self.small:
            excess = 0.5 * (torch.maximum(upper - rows.w, rows.w - lower) * rows.spread + rest)
            reach_exact = self._modulus_reach + self.diagonal_reach(excess)
            exact = (reach_exact < reach_triangle).to(triangle)
            extra = torch.where(exact[..., None] > 0, excess, triangle)
            largest = torch.where(exact > 0, reach_exact, reach_triangle)
        else:
            exact, extra, largest = torch.zeros_like(reach_triangle), triangle, reach_triangle
        constant = self._cubic(radius) + self._quartic(radius, 0.5 * (1.0 + 1.0 / slack)[..., None] * upper * drifted)
        return LogitForms(exact, extra, stack_multiplier(rows, largest), constant)

    def _cubic(self, radius: float) -> float:
        """``||stack E[q gamma]||`` (eq. 15)."""
        rows = self.rows
        factor = rows.value_norms * rows.bilinear_norms
        size = (factor[:, None] * rows.w.amax(dim=-1)).square().sum(dim=0) * rows.moves * stack_weights(rows)
        return radius**3 * math.sqrt(float(size.max()))

    def _quartic(self, radius: float, coefficient: Tensor) -> float:
        """``||stack sum_j coefficient_j q_j^2||`` (eq. 16)."""
        rows = self.rows
        root = coefficient.amax(dim=-1).sqrt() + coefficient.sum(dim=-1).sqrt() * rows.weight_energy[..., 0].sqrt()
        size = (root * rows.bilinear_norms[:, None]).square() * rows.moves
        if rows.row_weights is None:
            return radius**4 * math.sqrt(float(size.square().sum(dim=0).max()))
        return radius**4 * math.sqrt(float((size * rows.row_weights).amax(dim=1).square().sum()))


def stack_multiplier(rows: CleanRows, largest: Float[Tensor, "h n"]) -> Float[Tensor, "h n"]:
    """Factors m_g with ``||stack x||^2 <= |D|^2 sum_g m_g x_g`` when ``x_g <= largest_g |D|^2`` (eq. 11)."""
    if rows.row_weights is None:
        return largest
    return (rows.row_weights * largest).sum(dim=1, keepdim=True) * rows.row_weights


def padded(value: float) -> float:
    """Outward move that covers the rounding of sums of up to 1e6 terms."""
    return value * (1.0 + CANCELLATION * 1e3)
