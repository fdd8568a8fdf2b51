"""Dot-product attention: the softmax remainder with saturating weights, per row-head.

Notation of docs/displacement-certificate.md: row-heads g = (h, i), softmax weights w, ``u = l + q``, values behind the
inner part of the output projection; docs/network-composite.md, 5c.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import ValueRows
from attnrobust.certify.network.composite.nodes.base import Channel, NodeRemainder, largest_eigenvalues
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.attend import AttentionState
from attnrobust.layers.graph.node import Edges
from attnrobust.numerics.rounding import CANCELLATION, ENTRY, FORMULA, nan_is_infinite, outward
from attnrobust.numerics.suprema import growing_weight, saturating_weight


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Suprema of the features on a ball, or of their raw parts per metric norm of the remainder.

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

    def ball(self, raw: "_Sizes", radius: float, rho: float) -> "_Sizes":
        """These as tangents, the other as raw parts."""
        return _Sizes(
            *(
                getattr(self, name) * radius + getattr(raw, name) * rho
                for name in ("logits", "values", "queries", "keys", "rows")
            )
        )


class AttendRemainder(NodeRemainder):
    """Remainder of attention.

    Args:
        port: What it reads; its scales are one number per token.
        state: Its derivatives at the clean tokens.
    """

    def __init__(self, port: Port, state: AttentionState) -> None:
        super().__init__(port)
        jacobian = state.jacobian
        self._state, self._layer = state, jacobian.attention
        self._clean = ValueRows(jacobian.attention, jacobian.points, jacobian.mass)
        self._inner, self._outer = _split_projection(self._clean)
        n, heads, size = jacobian.n, self._layer.heads, self._inner.shape[-1]
        left = self._clean.balanced_factors[0]
        zeros = jacobian.points.new_zeros
        self._logits = zeros(heads, n, n)
        self._grams = {
            name: zeros(heads, n, width, width)
            for name, width in {"values": size, "rows": size, "queries": left.shape[-1], "keys": left.shape[-1]}.items()
        }

    def curved(self) -> Channel:
        return self.channels["out"]

    @property
    def channels(self) -> Mapping[str, Channel]:
        heads = Channel(self._emit, self._absorb, (self._layer.heads, self._clean.n, self._inner.shape[-1]))
        same = lambda t: t  # noqa: E731
        return {"heads": heads, "out": Channel(same, same, (self._clean.n, self._layer.out_width))}

    def _emit(self, t: Tensor) -> Tensor:
        return torch.einsum("...hnr,hre->...ne", t, self._outer)

    def _absorb(self, y: Tensor) -> Tensor:
        return torch.einsum("...ne,hre->...hnr", y, self._outer)

    # ---- ranges ----------------------------------------------------------------------------------------------------

    def observe(self, edges: Edges) -> None:
        features = self._state.features(edges)
        self._logits += features.logits.square().sum(0)
        values = features.values @ self._inner
        weights = self._state.jacobian.weights
        rows = weights @ values + (weights * features.logits) @ self._clean.values
        left, right = self._clean.balanced_factors
        parts = {"values": values, "rows": rows, "queries": _heads(edges[0], left), "keys": _heads(edges[0], right)}
        for name, part in parts.items():
            by_row = part.permute(1, 2, 0, 3)
            self._grams[name] += by_row.mT @ by_row

    def settle(self) -> None:
        norms = {name: largest_eigenvalues(gram).sqrt() for name, gram in self._grams.items()}
        self._tangent = _Sizes(logits=outward(self._logits.sqrt(), FORMULA), **norms)
        self._raw = self._raw_sizes()

    def _raw_sizes(self) -> _Sizes:
        clean, w = self._clean, self._clean.weight
        inverse = 1.0 / self.port.scales[0].amin(-1)
        energy = (w.square() * inverse.square()).sum(-1)
        key = clean.beta_norm.square()[..., None] * ((1.0 - 2.0 * w) * inverse.square() + energy[..., None])
        mean = w @ clean.alpha
        distance = torch.cdist(mean, clean.alpha, compute_mode="donot_use_mm_for_euclid_dist").square()
        own = torch.eye(clean.n, dtype=w.dtype, device=w.device) - w.diagonal(dim1=1, dim2=2)[..., None]
        query = inverse.square()[:, None] * (distance + 2.0 * own * clean.cross)
        size = clean.beta_norm.square()[..., None] * (inverse.square() + 2.0 * energy[..., None])
        size = size + inverse.square()[:, None] * (distance + 2.0 * clean.cross.abs())
        logits = outward((key + query + 10.0 * CANCELLATION * size).clamp_min(0.0).sqrt(), FORMULA)
        factor = outward(clean.bilinear_norms.sqrt()[:, None] * inverse, FORMULA)
        rows = clean.value_norms[:, None] * energy.sqrt() + (w * logits * clean.spread).sum(-1)
        values = outward(clean.value_norms[:, None] * inverse, FORMULA)
        return _Sizes(logits=logits, values=values, queries=factor, keys=factor, rows=outward(rows, FORMULA))

    # ---- bounds ----------------------------------------------------------------------------------------------------

    def beyond(self, radius: float, rho: float) -> Mapping[str, float]:
        terms = _Terms(self._clean, self._tangent.ball(self._raw, radius, rho))
        third = _stack(torch.minimum(terms.third, terms.whole + terms.second))
        if self.kappa is not None:
            return {"heads": third, "out": outward(0.5 * self.kappa * rho**2, FORMULA)}
        zero = _Sizes(*(torch.zeros_like(part) for part in vars(self._raw).values()))
        return {"heads": third + _stack(_Terms(self._clean, zero.ball(self._raw, 0.0, rho)).second), "out": 0.0}

    def whole(self, radius: float, rho: float) -> Mapping[str, float]:
        return {"heads": _stack(_Terms(self._clean, self._tangent.ball(self._raw, radius, rho)).whole), "out": 0.0}


class _Terms:
    """The parts of the remainder per row-head on one ball, (h, n)."""

    def __init__(self, clean: ValueRows, sizes: _Sizes) -> None:
        self._w, self._spread, self._s = clean.weight, clean.spread, sizes
        around = (self._w @ sizes.keys[..., None])[..., 0]
        own = sizes.keys[:, None, :]  # |y_j - sum w y| <= (1 - w_j) |y_j| + sum of the others
        keys = (1.0 - 2.0 * self._w) * own + around[..., None]
        keys = (keys + CANCELLATION * (own + around[..., None])).clamp_min(0.0)
        self._bilinear = sizes.queries[..., None] * keys
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
        l, spread = self._s.logits, self._spread
        inside = self._bilinear * spread + l * self._values + 0.5 * l.square() * spread
        return (self._w * inside).sum(-1)

    @property
    def third(self) -> Tensor:
        """``(E[(q + psi) gamma] + E[(psi_3 + l q + q^2/2) vh] - P (a + second)) / (1 + P)``."""
        l, q, u, spread = self._s.logits, self._bilinear, self._logit, self._spread
        exact = self._w * (q * self._values + (l * q + 0.5 * q.square()) * spread)
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


def _stack(per_row: Tensor) -> float:
    return float(outward(nan_is_infinite(per_row).square().sum().sqrt(), FORMULA))


def _heads(e: Tensor, weight: Float[Tensor, "h d r"]) -> Float[Tensor, "b h n r"]:
    return torch.einsum("bnd,hdr->bhnr", e, weight)


def _split_projection(clean: ValueRows) -> tuple[Float[Tensor, "h v r"], Float[Tensor, "h r e"]]:
    """``w_o^h = inner_h outer_h`` with orthonormal rows of the outer part; a concatenation is such an outer part."""
    layer = clean.layer
    if layer.w_o is not None:
        outer = torch.linalg.qr(layer.w_o.transpose(-1, -2)).Q.transpose(-1, -2)
        return clean.inner, outer
    width = layer.value_width
    outer = clean.points.new_zeros(layer.heads, width, layer.out_width)
    for head in range(layer.heads):
        outer[head, :, head * width : (head + 1) * width] = torch.eye(width, dtype=outer.dtype)
    return clean.inner, outer
