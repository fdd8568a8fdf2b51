"""Dot-product attention: the softmax remainder with saturating weights, per row-head.

Notation of docs/displacement-certificate.md: row-heads g = (h, i), softmax weights w, ``u = l + q``, values behind the
inner part of the output projection; docs/network-composite.md, 5c.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import ValueRows
from attnrobust.certify.network.composite.nodes.attend_cumulants import Bounded, Cumulants, Stacked
from attnrobust.certify.network.composite.nodes.attend_terms import Factors, Sizes, Terms
from attnrobust.certify.network.composite.nodes.base import (
    Ball,
    Channel,
    Form,
    NodeRemainder,
    Reach,
    largest_eigenvalues,
    remainder_size,
)
from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.attend import AttentionState
from attnrobust.layers.graph.node import Edges
from attnrobust.numerics.rounding import (
    CANCELLATION,
    ENTRY,
    FORMULA,
    SMALLEST,
    nan_is_infinite,
    outward,
)

VANISHING = 1e-8  # change of a large logit per unit of the move, below which any radius is as typical
TYPICAL = 0.5  # change of a large logit at which the factors of the third order are compared; any is sound
STACK_LIMIT = 1024  # numbers of one head's keys or values up to which their norm is decomposed
GRAM_LIMIT = 64  # tokens up to which the (h, n, n, n) inner products of the logits are kept


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
        self._squares = {name: zeros(heads, n) for name in self._grams} | {"logits": zeros(heads, n, n)}
        self._logit_gram = zeros(heads, n, n, n) if n <= GRAM_LIMIT else None
        self._stacks = {
            name: zeros(heads, n * width, n * width)
            for name, width in (("keys", left.shape[-1]), ("values", size))
            if n * width <= STACK_LIMIT
        }
        self._shapes: dict[tuple[str, str], Reach] = {}
        self._seen: dict[Ball, Cumulants] = {}

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

    @property
    def features(self) -> int:
        return sum(square.numel() for square in self._squares.values())

    def observe(self, edges: Edges) -> None:
        logits, parts = self._features(edges)
        self._logits += logits.square().sum(0)
        if self._logit_gram is not None:
            weighed = (self._clean.weight.sqrt() * logits).permute(1, 2, 3, 0)
            self._logit_gram += weighed @ weighed.mT
        for name, part in parts.items():
            by_row = part.permute(1, 2, 0, 3)
            self._grams[name] += by_row.mT @ by_row
        for name, stack in self._stacks.items():
            by_head = parts[name].flatten(2).transpose(0, 1)
            stack += by_head.mT @ by_head

    def observe_second(self, edges: Edges) -> None:
        logits, parts = self._features(edges)
        self._squares["logits"] += logits.square().sum(0)
        for name, part in parts.items():
            self._squares[name] += part.square().sum(-1).sum(0)

    def _features(self, edges: Edges) -> tuple[Tensor, dict[str, Tensor]]:
        features, weights = self._state.features(edges), self._state.jacobian.weights
        values = features.values @ self._inner
        rows = weights @ values + (weights * features.logits) @ self._clean.values
        left, right = self._clean.balanced_factors
        parts = {"values": values, "rows": rows, "queries": _heads(edges[0], left), "keys": _heads(edges[0], right)}
        return features.logits, parts

    def settle(self) -> None:
        norms = {name: largest_eigenvalues(gram).sqrt() for name, gram in self._grams.items()}
        self._tangent = Sizes(logits=outward(self._logits.sqrt(), FORMULA), **norms)
        self._bend = Sizes(**{name: outward(square.sqrt(), FORMULA) for name, square in self._squares.items()})
        self._raw = self._raw_sizes()
        self._stacked = Stacked(self._logit_gram, self._stack_norm("keys"), self._stack_norm("values"))
        self._stacks = {}
        if self._logit_gram is not None:
            self._shapes = self._reaches(self._logit_gram)

    def _stack_norm(self, name: str) -> Tensor:
        """Of a feature of all tokens together, per head."""
        if name in self._stacks:
            norm: Tensor = largest_eigenvalues(self._stacks[name]).sqrt()
            return norm
        whole: Tensor = torch.linalg.vector_norm(getattr(self._tangent, name), dim=-1)
        return outward(whole, FORMULA)

    def _reaches(self, gram: Tensor) -> dict[tuple[str, str], Reach]:
        """``(E l^2)^{1/2}`` and ``|left^T e_i|`` of every row; weights by what third and fourth order make of them."""
        w, large = self._clean.weight, float(self._tangent.logits.quantile(0.9))
        cumulants = self._cumulants(Ball(TYPICAL / large if large > VANISHING else 1.0, 0.0, 0.0))
        bend, raw = ((w * part.logits.square()).sum(-1).sqrt() for part in (self._bend, self._raw))
        logits = (largest_eigenvalues(gram).sqrt(), outward(bend, ENTRY), outward(raw, ENTRY))
        queries = (self._tangent.queries, self._bend.queries, self._raw.queries)
        found = {}
        for order, bounded in (("third", cumulants.third()), ("fourth", cumulants.fourth())):
            found["logits", order] = Reach(*logits, _weights(bounded.factors.logits))
            found["queries", order] = Reach(*queries, _weights(bounded.factors.queries))
        return found

    @property
    def forms(self) -> Mapping[str, Form]:
        return {" ".join(key): self._form(key[0], reach.weights) for key, reach in self._shapes.items()}

    def _form(self, name: str, weights: Tensor) -> Form:
        if name == "queries":
            left, scale = self._clean.balanced_factors[0], weights.sqrt()[..., None]
            return Form(
                lambda edges: (scale * _heads(edges[0], left)).flatten(-3),
                lambda flat: (_tokens(scale * flat.unflatten(-1, (*weights.shape, -1)), left),),
            )
        root = (weights[..., None] * self._clean.weight).sqrt()
        return Form(
            lambda edges: (root * self._state.features(edges).logits).flatten(-3),
            lambda flat: self._state.logits_adjoint(root * flat.unflatten(-1, tuple(root.shape))),
        )

    def _raw_sizes(self) -> Sizes:
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
        return Sizes(logits=logits, values=values, queries=factor, keys=factor, rows=outward(rows, FORMULA))

    # ---- bounds ----------------------------------------------------------------------------------------------------

    def _first(self, ball: Ball) -> Sizes:
        return self._tangent.joined(self._tangent, lambda t, _: t * ball.radius)

    def _rest(self, ball: Ball) -> Sizes:
        return self._bend.joined(self._raw, lambda bend, raw: remainder_size(bend, raw, ball))

    def _all(self, ball: Ball) -> Sizes:
        return self._first(ball).joined(self._rest(ball), torch.add)

    def _cumulants(self, ball: Ball) -> Cumulants:
        """Kept for the two balls of a radius: all orders share their moments."""
        if ball not in self._seen:
            made = Cumulants(self._clean, ball.radius, self._first(ball), self._rest(ball), self._stacked)
            self._seen = dict([*self._seen.items()][-1:]) | {ball: made}
        return self._seen[ball]

    def whole(self, ball: Ball) -> Mapping[str, float]:
        terms, bounded = Terms(self._clean, self._all(ball)), self._cumulants(ball).whole()
        apart = _stack(torch.minimum(terms.whole, nan_is_infinite(bounded.rows)))
        jointly = [self._jointly(factors, ball) for factors in (terms.whole_factors, bounded.factors)]
        return {"heads": min(apart, *jointly), "out": 0.0}

    def third(self, ball: Ball) -> Mapping[str, float]:
        return {"heads": self._third(Terms(self._clean, self._all(ball)), ball), "out": 0.0}

    def fourth(self, ball: Ball) -> Mapping[str, float]:
        """Fourth order and ``C3(e) - C3(T D)``, a difference of polynomials; or nothing taken off."""
        terms, first = Terms(self._clean, self._all(ball)), Terms(self._clean, self._first(ball))
        change = (terms.cubic - first.cubic + CANCELLATION * terms.cubic).clamp_min(0.0)
        bounded = self._cumulants(ball).fourth()
        rows = torch.minimum(terms.fourth, nan_is_infinite(bounded.rows))
        apart = _stack(torch.minimum(rows + change, terms.third + first.cubic))
        fourth = min(self._jointly(factors, ball, change) for factors in (terms.fourth_factors, bounded.factors))
        cubic = min(_stack(first.cubic), self._jointly(first.cubic_factors, Ball(ball.radius, 0.0, 0.0)))
        return {"heads": min(apart, fourth, self._third(terms, ball) + cubic), "out": 0.0}

    def quadratic(self, ball: Ball) -> Mapping[str, float]:
        """By the norm of the form at the output, or row by row."""
        apart = _stack(Terms(self._clean, self._rest(ball)).second)
        form = math.inf if self.kappa is None else outward(0.5 * self.kappa * ball.rho**2, FORMULA)
        return {"heads": 0.0, "out": form} if form < apart else {"heads": apart, "out": 0.0}

    def third_readout(self, cotangent: Tensor, ball: Ball) -> float:
        """``sum_g |c_g| third_g`` with the parts c_g of the cotangent before the output projection."""
        factors = Terms(self._clean, self._all(ball)).third_squares
        if not self._shapes or not factors.finite:
            return math.inf
        importance = outward(torch.linalg.vector_norm(self._absorb(cotangent), dim=-1), FORMULA)
        square = self._joint_size("logits", (importance * factors.logits).sqrt(), ball) ** 2
        linear = _stack(importance) * self._joint_size("queries", factors.queries, ball)
        return outward(square + linear + float((importance * factors.rest).sum()), FORMULA)

    def _third(self, terms: Terms, ball: Ball) -> float:
        bounded: Bounded = self._cumulants(ball).third()
        rows = torch.minimum(terms.third, nan_is_infinite(bounded.rows))
        apart = _stack(torch.minimum(rows, terms.whole + terms.second))
        joint = self._jointly(terms.whole_factors, ball) + _stack(terms.second)
        return min(apart, joint, *(self._jointly(f, ball) for f in (terms.third_factors, bounded.factors)))

    def _jointly(self, factors: Factors, ball: Ball, more: Tensor | None = None) -> float:
        """The stack of a part of the remainder by the joint sizes of its factors: they cannot all be large at once."""
        if not self._shapes or not factors.finite:
            return math.inf
        total = _stack(factors.rest if more is None else factors.rest + more)
        total += self._joint_size("logits", factors.logits, ball) + self._joint_size("queries", factors.queries, ball)
        return outward(total, FORMULA)

    def _joint_size(self, name: str, factor: Tensor, ball: Ball) -> float:
        """``(sum_g factor_g^2 feature_g^2)^{1/2}``: of T D by lemma 5 with the best form, of R row by row."""
        reaches = {" ".join(key): reach for key, reach in self._shapes.items() if key[0] == name}
        still = ball.still
        first = [replace(reach, joint=self.joints.get(key)).stacked(factor, still) for key, reach in reaches.items()]
        rest = next(iter(reaches.values())).rest(ball)
        return outward(min(first) + _stack(factor * rest), FORMULA)


def _weights(factor: Tensor) -> Tensor:
    """Positive weights of a joint form from the factors that it is for."""
    square = factor.square()
    square = torch.where(torch.isfinite(square), square, 0.0)
    return square + 1e-2 * square.mean() + SMALLEST


def _stack(per_row: Tensor) -> float:
    return float(outward(nan_is_infinite(per_row).square().sum().sqrt(), FORMULA))


def _heads(e: Float[Tensor, "*b n d"], weight: Float[Tensor, "h d r"]) -> Float[Tensor, "*b h n r"]:
    return torch.einsum("...nd,hdr->...hnr", e, weight)


def _tokens(y: Float[Tensor, "*b h n r"], weight: Float[Tensor, "h d r"]) -> Float[Tensor, "*b n d"]:
    return torch.einsum("...hnr,hdr->...nd", y, weight)


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
