"""The parts of attention's remainder per row-head on one ball; docs/network-composite.md, 5c."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnrobust.certify.displacement.base import ValueRows
from attnrobust.numerics.rounding import CANCELLATION, nan_is_infinite
from attnrobust.numerics.suprema import growing_weight, saturating_weight

NEAR = 8.0  # growth of a weight on the ball, up to which the token's logit counts in the mean square of its row


@dataclass(frozen=True, eq=False)
class Sizes:
    """Suprema of the features, of the tangents, of the second order, or of a remainder of metric norm 1.

    Args:
        logits: ``|l_j|``, (h, n, n).
        values: ``|gamma_j|``, (h, n).
        queries: ``|left^T e_i|``, (h, n).
        keys: ``|right^T e_j|``, (h, n).
        rows: ``|a|``, first-order change of the row, (h, n).
    """

    logits: Tensor
    values: Tensor
    queries: Tensor
    keys: Tensor
    rows: Tensor

    def joined(self, other: "Sizes", how: Callable[[Tensor, Tensor], Tensor]) -> "Sizes":
        """Combined feature by feature."""
        return Sizes(*(how(getattr(self, part.name), getattr(other, part.name)) for part in fields(self)))


@dataclass(frozen=True, eq=False)
class Factors:
    """A part of the remainder, per row-head at most ``logits (E l^2)^{1/2} + queries |left^T e_i| + rest``, (h, n).

    Args:
        logits: Factor of the row's first-order logit change.
        queries: Factor of the query's change.
        rest: What keeps neither.
    """

    logits: Tensor
    queries: Tensor
    rest: Tensor

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed."""
        return all(bool(torch.isfinite(part).all()) for part in (self.logits, self.queries, self.rest))


def centred_sizes(w: Tensor, keys: Tensor) -> Tensor:
    """``|y_j - sum w y| <= (1 - w_j) |y_j| + sum of the others``, (h, n, n)."""
    around, own = (w @ keys[..., None])[..., 0], keys[:, None, :]
    found = (1.0 - 2.0 * w) * own + around[..., None]
    return (found + CANCELLATION * (own + around[..., None])).clamp_min(0.0)


class Terms:
    """The parts of the remainder per row-head on one ball, (h, n)."""

    def __init__(self, clean: ValueRows, sizes: Sizes) -> None:
        self._w, self._spread, self._s = clean.weight, clean.spread, sizes
        self._keys = centred_sizes(self._w, sizes.keys)
        self._bilinear = sizes.queries[..., None] * self._keys
        self._logit = sizes.logits + self._bilinear
        self._upper = saturating_weight(clean.log_weight, self._logit)
        self._paired = growing_weight(clean.log_weight, self._logit)
        self._visible = ~torch.isneginf(clean.log_weight)

    @property
    def _values(self) -> Tensor:
        return self._s.values[:, None, :]

    @property
    def _partition(self) -> Tensor:
        """``P / (1 + P) <= min(1, 1/2 sum f u^2)``."""
        return (0.5 * self._upper * self._logit.square()).sum(-1).clamp_max(1.0)

    @property
    def second(self) -> Tensor:
        """``|E[q vh] + E[l gamma] + 1/2 E[l^2 vh]|``."""
        logit, spread = self._s.logits, self._spread
        inside = self._bilinear * spread + logit * self._values + 0.5 * logit.square() * spread
        return (self._w * inside).sum(-1)

    @property
    def cubic(self) -> Tensor:
        """``|C3| = |E[(q + l^2/2) gamma] + E[(l q + l^3/6) vh] - E[l^2]/2 a|``: a polynomial, all signs positive."""
        logit, q, spread = self._s.logits, self._bilinear, self._spread
        bent = 0.5 * logit.square()
        inside = (q + bent) * self._values + (logit * q + logit.pow(3) / 6.0) * spread + bent * self._s.rows[..., None]
        return (self._w * inside).sum(-1)

    @property
    def fourth(self) -> Tensor:
        """``(E[(psi - l^2/2)(gamma - a)] + E[(psi_3 - l^3/6 + q^2/2) vh] - P (second + C3)) / (1 + P)``."""
        logit, q, u, spread = self._s.logits, self._bilinear, self._logit, self._spread
        curved = self._upper * u.pow(3) / 6.0 + self._w * (logit * q + 0.5 * q.square())
        steep = 3.0 * logit.square() * q + 3.0 * logit * q.square() + q.pow(3)
        steep = self._upper * u.pow(4) / 24.0 + self._w * (steep / 6.0 + 0.5 * q.square())
        inside = curved * (self._values + self._s.rows[..., None]) + steep * spread
        return inside.sum(-1) + self._partition * (self.second + self.cubic)

    @property
    def third(self) -> Tensor:
        """``(E[(q + psi) gamma] + E[(psi_3 + l q + q^2/2) vh] - P (a + second)) / (1 + P)``."""
        logit, q, u, spread = self._s.logits, self._bilinear, self._logit, self._spread
        exact = self._w * (q * self._values + (logit * q + 0.5 * q.square()) * spread)
        curved = self._upper * u.square() * (0.5 * self._values + u / 6.0 * spread)
        return (exact + curved).sum(-1) + self._partition * (self._s.rows + self.second)

    @property
    def whole(self) -> Tensor:
        """``(E[q vh] + E[(e^u - 1) gamma] + E[psi (vh - a)]) / (1 + P)``; and the values' hull."""
        inside = self._w * self._bilinear * self._spread + self._paired * self._logit * self._values
        curved = 0.5 * self._upper * self._logit.square() * self._spread
        direct = (inside + curved).sum(-1) + self._partition * self._s.rows
        hull = torch.where(self._visible, self._spread + self._values, 0.0).amax(-1) + self._s.rows
        return torch.minimum(nan_is_infinite(direct), hull)

    # ---- with one factor kept --------------------------------------------------------------------------------------

    def _kept(self, logits: Tensor, bilinear: Tensor) -> Factors:
        """``sum_j (k_j |l_j| + m_j |q_j|)`` with ``|q_j| <= |left^T e_i| key_j``.

        ``sum_j k_j |l_j| <= (sum k^2 / w)^{1/2} (E l^2)^{1/2}`` over the tokens that count; those whose coefficient may
        grow far beyond their weight do not: any choice of them is sound.
        """
        near = torch.maximum(self._upper, self._paired) <= NEAR * self._w
        energy = torch.where(near & (logits > 0.0), logits.square() / self._w, 0.0).sum(-1)
        far = torch.where(near, 0.0, logits * self._s.logits).sum(-1)
        return Factors(energy.sqrt(), (bilinear * self._keys).sum(-1), far)

    @property
    def whole_factors(self) -> Factors:
        """``whole`` with one factor |u_j| of every term kept, or the q of ``E[q vh]``."""
        bent = self._paired * self._values + 0.5 * self._upper * self._logit * (self._spread + self._s.rows[..., None])
        return self._kept(bent, bent + self._w * self._spread)

    @property
    def third_squares(self) -> Factors:
        """``third <= logits E l^2 + queries |left^T e_i| + rest``: ``u^2 <= l^2 + |q| (2 |l| + |q|)``."""
        logit, q, spread, w = self._s.logits, self._bilinear, self._spread, self._w
        after = (self._s.rows + self.second)[..., None]
        square = 0.5 * self._upper * (self._values + self._logit / 3.0 * spread + after)
        near = self._upper <= NEAR * w
        ratio = torch.where(near & (square > 0.0), square / w, 0.0).amax(-1)
        far = torch.where(near, 0.0, square * logit.square()).sum(-1)
        bilinear = square * (2.0 * logit + q) + w * (self._values + (logit + 0.5 * q) * spread)
        return Factors(ratio, (bilinear * self._keys).sum(-1), far)

    @property
    def third_factors(self) -> Factors:
        """``third`` with one factor kept."""
        q, u, spread, w = self._bilinear, self._logit, self._spread, self._w
        after = (self._s.rows + self.second)[..., None]
        bent = 0.5 * self._upper * u * (self._values + u / 3.0 * spread + after)
        return self._kept(bent + w * q * spread, bent + w * (self._values + 0.5 * q * spread))

    @property
    def fourth_factors(self) -> Factors:
        """``fourth`` with one factor kept."""
        logit, q, u, spread, w = self._s.logits, self._bilinear, self._logit, self._spread, self._w
        carried, after = self._values + self._s.rows[..., None], (self.second + self.cubic)[..., None]
        bent = self._upper * (u.square() / 6.0 * carried + u.pow(3) / 24.0 * spread + 0.5 * u * after)
        crossed = w * (q * carried + 0.5 * (logit * q + q.square()) * spread)
        return self._kept(bent + crossed, bent + w * (0.5 * q * carried + (q.square() / 6.0 + 0.5 * q) * spread))

    @property
    def cubic_factors(self) -> Factors:
        """``cubic`` with one factor kept."""
        logit, q, spread = self._s.logits, self._bilinear, self._spread
        bent = 0.5 * logit * (self._values + self._s.rows[..., None]) + (q + logit.square() / 6.0) * spread
        return self._kept(self._w * bent, self._w * self._values)
