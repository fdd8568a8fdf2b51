"""Displacement certificate: the remainder's coefficients at one radius (docs section 4)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import GRAM_LIMIT, TOGETHER, MovingRows
from attnrobust.certify.displacement.cumulant import cumulant_modulus
from attnrobust.numerics.eigenvalues import power_eigenvalue
from attnrobust.numerics.exponential import log_phi, log_psi, phi_negative
from attnrobust.numerics.rounding import CANCELLATION, ENTRY, FORMULA, SMALLEST, SMALLEST_UNIT, inward, nonzero, outward
from attnrobust.numerics.suprema import growing_weight, saturating_weight

UNDERFLOW_LOG = 600.0  # minus the log of weights whose products may underflow
SINE_COSINE = 2.0 / (3.0 * math.sqrt(3.0))  # sup of sin(x) cos(x)^2 and of sin(x)^2 cos(x)


@dataclass(frozen=True, eq=False)
class LogitForms:
    """``|(curved part)_g| <= l^T (exact_g N_g + diag(extra_g)) l`` plus what has two factors q, on the ball.

    Args:
        exact: Coefficient of the cumulant's modulus, 0 where the triangle inequality is used, (h, n).
        extra: Diagonal coefficients of l_j^2, (h, n, n).
        multiplier: Factor of row-head g in the stacked form, (h, n).
        query: Coefficients of ``|A^T delta_i|^2`` in the form of everything with two factors q or q and gamma, (h, n).
        paired: What ``|w_j (e^{u_j} - 1)| / (1 + P)`` is at most, per ``|u_j|``, (h, n, n).
    """

    exact: Float[Tensor, "h n"]
    extra: Float[Tensor, "h n n"]
    multiplier: Float[Tensor, "h n"]
    query: Float[Tensor, "h n"]
    paired: Float[Tensor, "h n n"]

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed."""
        parts = (self.exact, self.extra, self.multiplier, self.query, self.paired)
        return all(bool(torch.isfinite(part).all()) for part in parts)


@dataclass(frozen=True, eq=False)
class RemainderMajorant:
    """Builds ``LogitForms`` for any radius (Frobenius norm of the move).

    Args:
        rows: The rows.
        one_direction: Whether rows that see a single moving token among their keys use their closed form (eq. 13b).
    """

    rows: MovingRows
    one_direction: bool = True

    @property
    def _single(self) -> int | None:
        return self.rows.single if self.one_direction else None

    @property
    def small(self) -> bool:
        """Whether the (h, n, n, n) arrays are used."""
        return self.rows.n <= GRAM_LIMIT

    @cached_property
    def _own_only(self) -> slice:
        """The rows whose logit change has more than one direction: all, or the row of the only moving token."""
        token = self._single
        return slice(None) if token is None else slice(token, token + 1)

    @property
    def modulus(self) -> Float[Tensor, "h n n n"]:
        """N_g: half the modulus of the third cumulant."""
        return self._moduli[0]

    @cached_property
    def _moduli(self) -> tuple[Float[Tensor, "h n n n"], Float[Tensor, "h m"]]:
        """N_g, and of the rows with a Gram matrix ``sup l^T N_g l``; head by head to bound the memory."""
        rows, moduli, reaches = self.rows, [], []
        clean = zip(rows.clean.weight, rows.clean.values, rows.clean.averages, self.gram, strict=True)
        for w, values, average, gram in clean:
            modulus, root = cumulant_modulus(w, values[None] - average[:, None])
            own = root[self._own_only]
            largest = torch.linalg.eigvalsh(0.5 * (own @ gram @ own))[..., -1].clamp_min(0.0)
            moduli.append(0.5 * modulus)
            reaches.append(outward(largest, FORMULA))
        return torch.stack(moduli), torch.stack(reaches)

    @cached_property
    def modulus_reach(self) -> Float[Tensor, "h n"]:
        """``sup l^T N_g l`` over moves of norm 1; where one other token moves, of the cumulant (13b)."""
        w, spread = self.rows.clean.weight, self.rows.clean.spread
        return self._with_single(self._moduli[1], 0.5 * w * (1.0 - 2.0 * w).abs() * spread)

    @cached_property
    def gram(self) -> Float[Tensor, "h m n n"]:
        """Gram matrices of the rows that need one."""
        return self.rows.gram_of(self._own_only)

    def _with_single(self, own: Float[Tensor, "h m"], other: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """``own`` in its rows; elsewhere ``y^2 other_j`` of the only moving token j, where ``|y| <= |b|`` (eq. 13b)."""
        token = self._single
        if token is None:
            return own
        norm = self.rows.clean.pair_norm.expand_as(other)[..., token]
        out = outward(norm.square() * other[..., token], FORMULA)
        out[:, self._own_only] = own
        return out

    def diagonal_reach(self, coefficient: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """Upper bound of ``sup sum_j coefficient_j l_j^2`` over moves of norm 1 (eq. 13)."""
        rows = self.rows
        if self.small:
            reach = torch.cat([self._gram_reach(coefficient, heads) for heads in self._together])
            if self._single is None:
                return reach
            norm = rows.clean.pair_norm.expand_as(coefficient)[..., self._single]
            other = outward(norm.square() * (coefficient * rows.contrast.square()).sum(dim=-1), FORMULA)
            other[:, self._own_only] = reach
            return other
        query = (coefficient * self._query_distance.square()).sum(dim=-1).sqrt() * rows.moves
        return outward((self._key_spread(coefficient) + query).square(), FORMULA)

    def _gram_reach(self, coefficient: Float[Tensor, "h n n"], heads: slice) -> Float[Tensor, "c m"]:
        """``diagonal_reach`` of the rows with a Gram matrix, of some heads."""
        root = coefficient[heads, self._own_only].sqrt()
        return power_eigenvalue(root[..., :, None] * self.gram[heads] * root[..., None, :], squarings=2)

    @property
    def _together(self) -> list[slice]:
        """Heads whose (n, n, n) arrays are made at once: they stay in the cache, and memory does not grow with h."""
        count = max(1, TOGETHER // self.rows.n**3)
        return [slice(start, start + count) for start in range(0, self.rows.clean.layer.heads, count)]

    @property
    def _query_distance(self) -> Float[Tensor, "h n n"]:
        clean = self.rows.clean
        if clean.layer.rotary is not None:
            return clean.query_distance
        rotated, mean = clean.centred_keys
        return torch.cdist(mean, rotated, compute_mode="donot_use_mm_for_euclid_dist")

    def _key_spread(self, coefficient: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """``sup (sum_j coefficient_j (key part of l_j)^2)^{1/2}`` over moves of norm 1, through its mean (eq. 14)."""
        rows, norm = self.rows, self.rows.clean.beta_norm
        if rows.clean.layer.rotary is None:
            largest = (coefficient * rows.moves).amax(dim=-1).sqrt()
            return norm * (largest + coefficient.sum(dim=-1).sqrt() * rows.weight_energy[..., 0].sqrt())
        largest = (coefficient * rows.moves * rows.clean.pair_norm.square()).amax(dim=-1).sqrt()
        spread: Tensor = largest + coefficient.sum(dim=-1).sqrt() * rows.pair_energy[..., 0].sqrt()
        return spread

    @cached_property
    def _variance_reach(self) -> Float[Tensor, "h n"]:
        return self.diagonal_reach(self.rows.clean.weight)

    def reach(self, radius: float) -> Float[Tensor, "h n n"]:
        """``U_j >= sup |l_j + q_j|`` on the ball of this radius (eq. 6)."""
        rows = self.rows
        own = rows.own_contrast.abs()
        product = 0.5 * (own + rows.contrast) * rows.moves[:, None] * rows.clean.bilinear_norms[:, None, None]
        return radius * rows.logit_reach + radius**2 * product

    def inverse_partition(self, reach: Tensor, radius: float) -> Float[Tensor, "h n 1"]:
        """Lower bound of ``1 / (1 + P)`` on the ball (eq. 10): P through the variance or term by term."""
        rows = self.rows
        bilinear = radius**2 * rows.clean.bilinear_norms[:, None] * rows.clean.weight.amax(dim=-1).sqrt() * rows.moves
        log_w = rows.clean.log_weight
        visible = reach.masked_fill(torch.isneginf(log_w), 0.0)  # a weight that underflows may still grow back
        # Such a token's w_j U_j^2, with a weight large enough that no product underflows.
        tiny = torch.exp(log_w.clamp_min(-UNDERFLOW_LOG - 100.0)) * (log_w < -UNDERFLOW_LOG) * visible.square()
        deviation = (radius * self._variance_reach.sqrt() + bilinear).square() + tiny.sum(dim=-1)
        by_variance = 0.5 * deviation * torch.exp(log_phi(visible.amax(dim=-1)))
        by_term = torch.exp(rows.clean.log_weight + log_psi(visible)).sum(dim=-1)
        return 1.0 / (1.0 + torch.minimum(by_variance, by_term))[..., None]

    def forms(self, radius: float) -> LogitForms:
        """Coefficients valid for every move of Frobenius norm <= radius."""
        rows = self.rows
        reach = self.reach(radius)
        inverse = self.inverse_partition(reach, radius)
        upper = saturating_weight(rows.clean.log_weight, reach)
        paired = growing_weight(rows.clean.log_weight, reach)
        drift = radius * self.drift()
        exact, extra, largest = self._curved(
            upper, inward(rows.clean.weight * phi_negative(reach) * inverse, ENTRY), drift
        )
        linear = rows.logit_reach.masked_fill(torch.isneginf(rows.clean.log_weight), 0.0).amax(dim=-1)
        slack = (radius * rows.clean.bilinear_norms[:, None] / nonzero(linear)).clamp(1e-9, 1.0)
        first, second = self.quartic_roots(exact, extra)
        roots = ((1.0 + 1.0 / slack).sqrt() * first, (1.0 + 1.0 / slack).sqrt() * second)
        largest = (1.0 + slack) * largest
        largest = torch.minimum(largest, self.cap(reach, inverse, rows.clean.spread + drift) / radius**2)
        return LogitForms(
            exact=(1.0 + slack) * exact,
            extra=(1.0 + slack)[..., None] * extra,
            multiplier=stack_multiplier(rows, largest),
            query=self.query_weight(roots, self.crossed(paired), radius),
            paired=paired,
        )

    def drift(self) -> Float[Tensor, "h n 1"]:
        """What psi averages beside vh_j, per unit of the move: ``|a|``, or 0 where a may shrink (eq. 3, 3a, 8)."""
        reach = self.rows.average_reach[..., None]
        return torch.zeros_like(reach) if self.rows.separate else reach

    def _curved(self, upper: Tensor, lower: Tensor, drift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``|curved part| <= u^T (exact N + diag(extra)) u`` and its supremum over l for moves of norm 1 (eq. 12)."""
        rows = self.rows
        triangle = 0.5 * upper * (rows.clean.spread + drift)
        reach_triangle = self.diagonal_reach(triangle)
        if not self.small:
            return torch.zeros_like(reach_triangle), triangle, reach_triangle
        w, spread = rows.clean.weight, rows.clean.spread
        size = nonzero((w * spread).sum(dim=-1, keepdim=True))
        centre = (0.5 * ((upper + lower) * spread).sum(dim=-1, keepdim=True) / size).clamp(0.0, 1.0)
        excess = torch.maximum(upper - centre * w, centre * w - lower) * spread + upper * drift
        reach_exact = centre[..., 0] * self.modulus_reach + self.diagonal_reach(0.5 * excess)
        chosen = reach_exact < reach_triangle
        exact = torch.where(chosen, centre[..., 0], torch.zeros_like(reach_exact))
        extra = torch.where(chosen[..., None], 0.5 * excess, triangle)
        return exact, extra, torch.where(chosen, reach_exact, reach_triangle)

    def cap(self, reach: Tensor, inverse: Tensor, drifted: Tensor) -> Float[Tensor, "h n"]:
        """Upper bound of ``|sum_j s_j (vh_j + ..)|``, ``s_j = w_j psi(u_j) / (1 + P)``, on the whole ball (eq. 13a)."""
        share = torch.sigmoid(self.rows.clean.log_weight + log_psi(reach))
        ordered, index = drifted.sort(dim=-1, descending=True)
        share = share.gather(-1, index)
        total = 1.0 - inverse + CANCELLATION  # sum s = P / (1 + P); a P below 1e-16 is lost in the difference
        left = total - (share.cumsum(dim=-1) - share)  # what the larger ones leave of it
        return outward((torch.minimum(share, left.clamp_min(0.0)) * ordered).sum(dim=-1), FORMULA) + SMALLEST

    def quartic_roots(self, exact: Float[Tensor, "h n"], extra: Float[Tensor, "h n n"]) -> tuple[Tensor, Tensor]:
        """``q^T (exact N + diag(extra)) q <= |A^T delta_i|^2 |D|^2 (a t^{1/2} + b (1 - t)^{1/2})^2``, t the share of i.

        Returns a and b, (h, n) each (eq. 16).
        """
        rows = self.rows
        other = ~torch.eye(rows.n, dtype=torch.bool, device=extra.device)
        if not self.small:
            first = (extra * rows.own_contrast.square()).sum(dim=-1).sqrt()
            energy = (rows.clean.weight.square() * rows.moves * other).sum(dim=-1).sqrt()
            second = (extra * rows.moves * other).amax(dim=-1).sqrt() + extra.sum(dim=-1).sqrt() * energy
            return first, second
        firsts, seconds = [], []
        for heads in self._together:
            matrix = exact[heads, :, None, None] * self.modulus[heads] + torch.diag_embed(extra[heads])
            matrix, rounding = self._centred(matrix, heads)
            own = torch.diagonal(torch.diagonal(matrix, dim1=-2, dim2=-1), dim1=-2, dim2=-1)
            firsts.append((own.clamp_min(0.0) + rounding).sqrt())
            rest = matrix * other[:, :, None] * other[:, None, :]
            seconds.append((power_eigenvalue(rest, squarings=2) + rounding).sqrt())
        return torch.cat(firsts), torch.cat(seconds)

    def _centred(self, matrix: Float[Tensor, "c n n n"], heads: slice) -> tuple[Tensor, Tensor]:
        """``C^T M C`` over the movable tokens with ``C = I - 1 w^T`` for every row, and a bound of its rounding."""
        w, moves = self.rows.clean.weight[heads], self.rows.moves
        sums = matrix.sum(dim=-1)
        mixed = sums[..., :, None] * w[..., None, :]
        inner = matrix - mixed - mixed.transpose(-1, -2)
        inner = inner + sums.sum(dim=-1)[..., None, None] * w[..., :, None] * w[..., None, :]
        size = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(dim=-1)
        return inner * moves * moves[:, None], CANCELLATION * self.rows.n * size

    def crossed(self, paired: Float[Tensor, "h n n"]) -> Float[Tensor, "h n"]:
        """``sup (sum_j paired_j^2 |delta_j - dbar|^2)^{1/2}`` over moves of norm 1 (eq. 15)."""
        rows = self.rows
        if self.small:
            parts = []
            for heads in self._together:
                matrix, rounding = self._centred(torch.diag_embed(paired[heads].square()), heads)
                parts.append((power_eigenvalue(matrix, squarings=2) + rounding).sqrt())
            return torch.cat(parts)
        shift = torch.linalg.vector_norm(paired, dim=-1) * rows.weight_energy[..., 0].sqrt()
        reach: Tensor = (paired * rows.moves).amax(dim=-1) + shift
        return reach

    def query_weight(
        self, roots: tuple[Tensor, Tensor], crossed: Float[Tensor, "h n"], radius: float
    ) -> Float[Tensor, "h n"]:
        """Coefficients z: ``||stack (quartic + cubic)|| <= (sum_g z_g |A^T delta_i|^2)^{1/2}`` (eq. 15, 16)."""
        rows = self.rows
        first, second = roots
        norms = rows.clean.bilinear_norms[:, None] * rows.moves
        cubic = radius**2 * rows.clean.value_norms[:, None] * crossed * rows.moves
        quartic = radius**3 * norms * (first.square() + SINE_COSINE * (2.0 * first * second + second.square()))
        if rows.row_weights is None:
            return (quartic + cubic).square()
        pooled = radius**3 * norms * (first.square() + second.square()) * rows.row_weights
        quartic = torch.where(
            (pooled.amax(dim=-1) < (quartic * rows.row_weights.sqrt()).amax(dim=-1))[:, None],
            pooled,
            quartic * rows.row_weights.sqrt(),
        )
        cubic = cubic * rows.row_weights.sqrt()
        ratio = (cubic.amax(dim=-1) / nonzero(quartic.amax(dim=-1), SMALLEST_UNIT)).clamp(1e-9, 1e9)[:, None]
        return (1.0 + ratio) * quartic.square() + (1.0 + 1.0 / ratio) * cubic.square()


def stack_multiplier(rows: MovingRows, largest: Float[Tensor, "h n"]) -> Float[Tensor, "h n"]:
    """Factors m_g with ``||stack x||^2 <= |D|^2 sum_g m_g x_g`` when ``x_g <= largest_g |D|^2`` (eq. 11)."""
    if rows.row_weights is None:
        return largest
    return (rows.row_weights * largest).sum(dim=1, keepdim=True) * rows.row_weights
